"""Modules' names in a kohya or LyCORIS file, where every dot is an underscore, and in a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ...errors import AdaptError, FileError, nearest

Prefix = str | Mapping[str, str | None]

KNOWN = re.compile(r"(lycoris|(?:lora|oft)_(?:unet|te\d*|transformer))(?=[_.])")


class Names:
    """Which module a file's name stands for, and the other way round.

    Putting underscores for dots loses something: `my_lin` and `my.lin` are one in a file. So a name is looked up among
    those of the model's modules, and is an error where two of them share it.

    Args:
        modules: all names of the model's modules.
        prefix: how the names begin in the file, for all of the model; or for each beginning the module that it stands
            for, `""` for the model, None for one that is to be passed over.
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
                called = f"{beginning}_{inside}" if inside else beginning
                self._found.setdefault(called, []).append(name)
                self._names.setdefault(name, called)

    def passes_over(self, called: str) -> bool:
        """Whether the file's name has a beginning that is to be passed over, and no longer one that is not."""
        fits = [beginning for beginning in self.prefixes if called == beginning or called.startswith(f"{beginning}_")]
        return bool(fits) and self.prefixes[max(fits, key=len)] is None

    def module(self, called: str) -> str:
        """The module that a file's name stands for.

        Raises:
            FileError: if there is none, or several.
        """
        names = self._found.get(called, [])
        if not names:
            begins = ", ".join(map(repr, self.prefixes))
            raise FileError(
                f"the file adapts {called!r}, and no module of this model is called so after {begins}; "
                f"{nearest(called, self._found)}"
            )
        if len({id(self.modules[name]) for name in names}) > 1:
            raise FileError(
                f"the file adapts {called!r}, which may be any of {', '.join(map(repr, names))}. Rename one of them."
            )
        return names[0]

    def called(self, module_name: str) -> str:
        """What a module is called in a file.

        Raises:
            AdaptError: if no prefix leads to it, or another module is called the same.
        """
        called = self._names.get(module_name)
        if called is None:
            raise AdaptError(f"no prefix leads to the module {module_name!r}; name one in prefix={dict(self.prefixes)}")
        others = [name for name in self._found[called] if self.modules[name] is not self.modules[module_name]]
        if others:
            raise AdaptError(f"{module_name!r} and {others[0]!r} would both be {called!r} in the file. Rename one of them.")
        return called


def prefix_of(names: Iterable[str]) -> str:
    """The beginning that all of a file's names share, of those in use.

    Raises:
        FileError: if there are several, or a name has none.
    """
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
