"""Modules' names in a kohya or LyCORIS file, where every dot is an underscore, and in a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ...errors import AdaptError, FileError, nearest

Prefix = str | Mapping[str, str | None]

KNOWN = re.compile(r"(lycoris|(?:lora|oft)_(?:unet|te\d*|transformer))(?=[_.])")


class ModuleNames:
    """Which module a name in a file stands for, and which name in a file a module has.

    Names in a file have underscores for dots, so `my_lin` and `my.lin` have one name there. A name is therefore looked up
    among the names of the model's modules, and it is an error if two modules have it.

    Args:
        modules: the model's modules, by dotted name.
        prefix: how the names begin in the file, for all of the model; or the module that each beginning stands for: `""` for
            the model, None for names to skip.
    """

    def __init__(self, modules: Mapping[str, nn.Module], prefix: Prefix) -> None:
        given: dict[str, str | None] = {prefix: ""} if isinstance(prefix, str) else dict(prefix)
        self.prefixes = {beginning.rstrip("_"): root for beginning, root in given.items()}
        unknown = next((root for root in self.prefixes.values() if root is not None and root not in modules), None)
        if unknown is not None:
            raise AdaptError(f"prefix leads to a module {unknown!r}, which is not in the model; {nearest(unknown, modules)}")
        self.modules = modules
        self._found: dict[str, list[str]] = {}
        self._names: dict[str, str] = {}
        for beginning, root in self.prefixes.items():
            for name in modules:
                if root is None or not (name == root or root == "" or name.startswith(f"{root}.")):
                    continue
                inside = name.removeprefix(root).removeprefix(".").replace(".", "_")
                flat_name = f"{beginning}_{inside}" if inside else beginning
                self._found.setdefault(flat_name, []).append(name)
                self._names.setdefault(name, flat_name)

    def skips(self, flat_name: str) -> bool:
        """Whether the longest beginning that fits a name in the file is one to skip."""
        fits = [beginning for beginning in self.prefixes if flat_name == beginning or flat_name.startswith(f"{beginning}_")]
        return bool(fits) and self.prefixes[max(fits, key=len)] is None

    def module(self, flat_name: str) -> str:
        """The module that a name in the file stands for; it is an error if there is none, or several."""
        names = self._found.get(flat_name, [])
        if not names:
            begins = ", ".join(map(repr, self.prefixes))
            raise FileError(
                f"the file adapts {flat_name!r}, and no module of this model is called so after {begins}; "
                f"{nearest(flat_name, self._found)}"
            )
        if len({id(self.modules[name]) for name in names}) > 1:
            raise FileError(
                f"the file adapts {flat_name!r}, which may be any of {', '.join(map(repr, names))}. Rename one of them."
            )
        return names[0]

    def flat_name(self, module_name: str) -> str:
        """A module's name in a file; it is an error if no prefix leads to the module, or another module has the same name."""
        flat_name = self._names.get(module_name)
        if flat_name is None:
            raise AdaptError(f"no prefix leads to the module {module_name!r}; name one in prefix={dict(self.prefixes)}")
        others = [name for name in self._found[flat_name] if self.modules[name] is not self.modules[module_name]]
        if others:
            raise AdaptError(f"{module_name!r} and {others[0]!r} would both be {flat_name!r} in the file. Rename one of them.")
        return flat_name


def prefix_of(names: Iterable[str]) -> str:
    """The known beginning that all names in a file share; it is an error if there are several, or a name has none."""
    found: dict[str, None] = {}
    for name in names:
        match = KNOWN.match(f"{name}.")
        if match is None:
            raise FileError(
                f"the file adapts {name!r}, which begins with none of lycoris, lora_unet, lora_te, lora_te1, oft_unet and "
                "the like. Say how its names begin: prefix=..."
            )
        found[match[1]] = None
    if len(found) > 1:
        example = ", ".join(f"{prefix!r}: {'' if i == 0 else None!r}" for i, prefix in enumerate(sorted(found)))
        raise FileError(
            f"the file is for several models: {', '.join(sorted(found))}. Say which module each of them stands for, '' for "
            f"all of this model and None for what to pass over: prefix={{{example}}}"
        )
    return next(iter(found), "lycoris")
