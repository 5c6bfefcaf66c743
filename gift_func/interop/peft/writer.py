"""Collects what is written to a PEFT directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ...adapted_model import AdaptedModel
from ...adapter import AdaptedParameter
from ...errors import AdaptError
from ...methods import Diff, Full, TrainableTokens
from ...methods.ia3 import ScaledBias
from ...select import Site
from . import config as configs
from .keys import FileTensor, Paths, ties_embeddings

Setting = TypeVar("Setting", bound=Hashable)


class PeftWriter:
    """Collects the file's tensors and config.

    Attributes:
        parts: the adapted parameters of the file's method, by name.
        biases: the changes of biases that are written with the change of their module.
        tokens: the embeddings with replaced rows.
        whole: the parameters that are trained whole.
        tensors: the weight file's, by key.
        config: the method's own keys.
        tied: whether PEFT keeps tied parameters tied as well.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        base, tree = adapted.frozen_base, adapted.copy_pool.tree
        if base.slots:
            raise AdaptError(
                "the model was adapted on top of another adapter, which PEFT's file would leave out. Save an adapter of "
                "adapted.merge() of the lower one, or save it natively (gf.save_adapter)."
            )
        self.base = base
        self.root = base.tree.module
        self.modules = base.tree.modules
        self.groups = {site.name: group for group in base.sites() for site in group}
        self.state = adapted.adapter_state_dict()
        self.buffers = {name: buffer for name, _, _, buffer in tree.buffers()}
        self.changed = self.state.keys() - adapted.adapter.keys()
        self.parts: dict[str, AdaptedParameter] = {}
        self.biases: dict[str, AdaptedParameter] = {}
        self.tokens: dict[str, AdaptedParameter] = {}
        self.whole: dict[str, AdaptedParameter] = {}
        self.tensors: dict[str, Tensor] = {}
        self.config: dict[str, Any] = {}
        self.tied = False
        for part in adapted.adapted_parameters:
            if part.name not in self.groups:
                raise AdaptError(f"{part.name!r} belongs to a module that an action put in, which no PEFT file can hold")
            match part.method:
                case Full():
                    self.whole[part.name] = part
                case Diff() | ScaledBias():
                    self.biases[part.name] = part
                case TrainableTokens():
                    self.tokens[part.name] = part
                case _:
                    self.parts[part.name] = part

    def site(self, name: str, tied: bool = False) -> Site:
        """The site of an adapted parameter; it is an error if that is tied and PEFT would not keep it so."""
        group = self.groups[name]
        if len(group) > 1 and not (tied or self.tied):
            others = ", ".join(site.name for site in group[1:])
            raise AdaptError(f"{name!r} is one with {others}, and PEFT would adapt one of them alone. Save it natively.")
        if not group[0].module_name:
            raise AdaptError(f"{name!r} belongs to the model itself; PEFT adapts modules inside of one. Put it in one.")
        return group[0]

    def can_stay_tied(self, name: str) -> bool:
        """Whether PEFT can keep a tied parameter tied: that of an embedding and a head, in a transformers model."""
        first, *others = self.groups[name]
        heads = all(isinstance(site.module, nn.Linear) for site in others)
        return ties_embeddings(self.root) and len(others) == 1 and heads and isinstance(first.module, nn.Embedding)

    def write_tensors(self, part: AdaptedParameter, file_tensors: Iterable[FileTensor]) -> None:
        """Add the tensors of an adapted parameter."""
        for file_tensor in file_tensors:
            self.tensors[file_tensor.key] = file_tensor.write(self.state[part.names[file_tensor.local]])

    def set_targets(self, chosen: Collection[str]) -> None:
        """Set the modules to adapt."""
        others = [name for name in self.modules if name and name not in chosen]
        self.config["target_modules"] = configs.shortest(chosen, others)

    def set_pattern(self, field: str, values: Mapping[str, Any], exact: bool = False) -> Any:
        """Set a pattern of the values that differ from the most common one, which is returned.

        With `exact` the pattern's keys are plain names in PEFT, and not expressions.
        """
        default = Counter(values.values()).most_common(1)[0][0]
        found = {name if exact else "^" + name.replace(".", r"\."): value for name, value in values.items() if value != default}
        self.config[field] = found
        return default

    def save_whole(self, paths: Paths, takes_biases: bool) -> None:
        """Add the parameters that are trained whole: as biases, or with the whole of their module."""
        saved = {self.groups[name][0].module_name: name for name in self.whole if not self._saved_as_bias(name, takes_biases)}
        if "" in saved:
            raise AdaptError(f"{saved['']!r} is a parameter of the model itself; PEFT saves modules whole. Save it natively.")
        matched = [name for name in self.modules if any(name.endswith(end) for end in saved)]
        for name in matched:
            self.save_module(name, paths.outside(name))
        self.config["modules_to_save"] = sorted(saved) or None
        inside = tuple(f"{name}." for name in matched)
        biases = [name for name in self.whole if not name.startswith(inside)]
        for name in biases:
            module_name = self.site(name).module_name
            self.write_tensors(self.whole[name], [FileTensor(f"{paths.inside(module_name)}.bias", "")])
        if takes_biases:
            beside = all(self.groups[name][0].module_name in paths.wrappers for name in biases)
            self.config["bias"] = "none" if not biases else "lora_only" if beside else "all"
        self.check_buffers(inside)

    def check_buffers(self, inside: tuple[str, ...]) -> None:
        """Refuse buffers that changed and are not in the file; `inside` has the beginnings of names of those that are in it."""
        buffer = next((name for name in sorted(self.changed) if not name.startswith(inside)), None)
        if buffer is not None:
            raise AdaptError(
                f"the buffer {buffer!r} differs from the base's, and PEFT's file has no place for it. Train its parameters "
                "whole (gf.NormTuning, gf.Full), keep it in eval mode, or save natively."
            )

    def _saved_as_bias(self, name: str, takes_biases: bool) -> bool:
        site = self.groups[name][0]
        beside = name.rpartition(".")[0]
        others = any(other.rpartition(".")[0] == beside and other != name for other in self.whole)
        return takes_biases and site.param_name == "bias" and not others

    def save_module(self, name: str, path: str) -> None:
        """Add a whole module, with its buffers, under a path of the file."""
        module, inside = self.modules[name], f"{name}."
        for param_name, _ in module.named_parameters():
            group = self.groups[inside + param_name]
            own = group[0].name
            if own in self.parts or own in self.tokens or own in self.biases:
                raise AdaptError(f"PEFT saves {name!r} whole, so {own!r} inside of it cannot be adapted otherwise")
            if own in self.whole and not all(site.name.startswith(inside) for site in group):
                raise AdaptError(f"{own!r} is tied to what is outside of {name!r}, and PEFT would save one of them alone")
            tensor = self.state[self.whole[own].names[""]] if own in self.whole else self.base.weights[own].dense()
            self.tensors[f"{path}.{param_name}"] = tensor.detach()
        for buffer_name in module.state_dict():
            if inside + buffer_name in self.buffers:
                self.tensors[f"{path}.{buffer_name}"] = self.buffers[inside + buffer_name].detach()

    def check(self) -> None:
        """Check that the config targets the modules that it names, and no others."""
        found = {name for name in self.modules if name and configs.targets(self.config, name)}
        wanted = self.config.get("target_modules") or []
        meant = {name for name in self.modules if name and configs.matches(wanted, name)}
        if found != meant:
            raise AdaptError(
                f"PEFT cannot both save a module whole and adapt what its name matches: {sorted(meant - found)[0]!r}. "
                "Save the adapter natively."
            )


def shared_value(what: str, values: Sequence[Setting]) -> Setting:
    """The value that all modules share; it is an error if they differ."""
    if len(set(values)) > 1:
        shown = ", ".join(sorted(map(str, set(values))))
        raise AdaptError(f"PEFT's config has one {what} for all places, and the adapter has {shown}. Save it natively.")
    return values[0]


def plain_number(value: float) -> float:
    """A whole number as an int, as PEFT writes them."""
    return int(value) if float(value).is_integer() else value
