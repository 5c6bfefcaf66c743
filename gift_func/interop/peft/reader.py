"""What a PEFT file's tensors become: a method for each parameter, and the adapter's state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError, nearest
from ...methods import Full, WeightMethod
from ...network.frozen_base import FrozenBase
from ...network.module_tree import join
from ...select import Site
from ...strategy import Placement
from .keys import FileTensor, Paths


class PeftReader:
    """Turns a file's tensors into methods, by parameter, and an adapter's state; what nothing reads remains."""

    def __init__(self, base: FrozenBase, tensors: dict[str, Tensor]) -> None:
        self.base = base
        self.modules = base.tree.modules
        self.groups = {site.name: group for group in base.sites() for site in group}
        self.remaining = dict(tensors)
        self.state: dict[str, Tensor] = {}
        self.methods: dict[str, WeightMethod] = {}

    def site(self, module_name: str, param_name: str) -> Site:
        """The site of a module's parameter."""
        name = join(module_name, param_name)
        return next(site for site in self.groups[name] if site.name == name)

    def take(self, key: str) -> Tensor:
        """Remove a tensor of the file, and return it; it is an error if it is not there."""
        if key not in self.remaining:
            raise FileError(f"the file lacks {key!r}, which its config asks for; {nearest(key, self.remaining)}")
        return self.remaining.pop(key)

    def place(self, site: Site, method: WeightMethod, file_tensors: Sequence[FileTensor], tied: bool = False) -> None:
        """Set the method of a parameter and its tensors; it is an error if one is missing.

        With `tied` the file means a tied parameter in all modules that have it; otherwise a tied parameter is an error.
        """
        group = self.groups[site.name]
        if len(group) > 1 and not tied:
            others = ", ".join(other.name for other in group if other.name != site.name)
            raise FileError(
                f"the file adapts {site.name!r} alone, and in this model it is one with {others}: PEFT would adapt one use "
                "of it, here a tied parameter stays tied. Untie them in the model (a copy of the parameter in one place)."
            )
        name = group[0].name
        if name in self.methods:
            raise FileError(f"the config adapts {name!r} twice, by {self.methods[name]} and by {method}")
        found = {file_tensor.local: file_tensor.read(self.take(file_tensor.key)) for file_tensor in file_tensors}
        method = with_dtype(method, site.parameter.dtype, found)
        self.methods[name] = method
        placement = Placement(name, site, method, method)
        for local, tensor in found.items():
            self.state[placement.full_name(local)] = tensor

    def check_tied(self, site: Site, file_tensors: Sequence[FileTensor]) -> None:
        """Remove the tensors that PEFT writes again for a tied parameter in another module; they must be those of the first."""
        name = self.groups[site.name][0].name
        placement = Placement(name, site, self.methods[name], self.methods[name])
        for file_tensor in file_tensors:
            found, first = file_tensor.read(self.take(file_tensor.key)), self.state[placement.full_name(file_tensor.local)]
            if found.shape != first.shape or not torch.equal(found, first):
                raise FileError(f"{file_tensor.key!r} is to be tied to what the file holds for {name!r}, and differs from it")

    def draw(self, site: Site, method: WeightMethod, names: Collection[str]) -> None:
        """Draw the tensors with these names, which follow from the method and the base alone, and so are in no file."""
        name = self.groups[site.name][0].name
        made = redrawn(site, method) if names else {}
        for local in names:
            self.state[Placement(name, site, method, method).full_name(local)] = made[local]

    def save_modules(self, wanted: Collection[str], paths: Paths, ties: bool = False) -> None:
        """Read the modules that are saved whole (`modules_to_save`): all whose name ends with one of `wanted`.

        `ties` says whether PEFT kept tied parameters tied.
        """
        for name, module in self.modules.items():
            if not name or not any(name.endswith(end) for end in wanted):
                continue
            path, inside = paths.outside(name), f"{name}."
            for param_name, _ in module.named_parameters():
                site = self.groups[inside + param_name]
                within = all(other.name.startswith(inside) for other in site)
                if site[0].name in self.methods and within:
                    continue  # a module within one that was read
                here = next(other for other in site if other.name == inside + param_name)
                self.place(here, Full(), [FileTensor(f"{path}.{param_name}", "")], tied=within or ties)
                for other in site if ties else []:
                    if not other.name.startswith(inside):
                        key = join(paths.outside(other.module_name), other.param_name)
                        self.check_tied(other, [FileTensor(key, "")])
            for buffer_name in module.state_dict():
                if f"{path}.{buffer_name}" in self.remaining and inside + buffer_name not in self.groups:
                    self.state[inside + buffer_name] = self.take(f"{path}.{buffer_name}")
            for param_name, _ in module.named_parameters():
                # With bias="all" PEFT also writes the biases under the names they have inside of its wrapper.
                for wrapper in ("original_module", "modules_to_save"):
                    self.remaining.pop(f"{path}.{wrapper}.{param_name}", None)

    def biases(self, paths: Paths) -> None:
        """Read the biases that were trained too."""
        for name, module in self.modules.items():
            key = f"{paths.inside(name)}.bias"
            if module._parameters.get("bias") is not None and key in self.remaining:
                self.place(self.site(name, "bias"), Full(), [FileTensor(key, "")])

    def base_weights(self, paths: Paths) -> None:
        """Read whole weights that the config does not name: those of embeddings, which PEFT adds.

        It is an error if one differs from the model's in shape, or differs and is adapted.
        """
        for name, module in self.modules.items():
            for param_name in module._parameters:
                key = join(paths.inside(name), param_name)
                if key not in self.remaining:
                    continue
                group = self.groups[join(name, param_name)]
                weight = self.base.weights[group[0].name].dense()
                found = self.remaining[key]
                if found.shape == weight.shape and torch.equal(found.to(weight), weight):
                    del self.remaining[key]
                elif found.shape != weight.shape or group[0].name in self.methods:
                    raise FileError(
                        f"the file holds a weight {key!r} of shape {tuple(found.shape)}, and the model's {group[0].name!r} of "
                        f"shape {tuple(weight.shape)} differs. Load the adapter on the base it was made for; if its "
                        "embeddings were resized or trained, resize the model's and put the file's weight there."
                    )
                else:
                    self.place(self.site(name, param_name), Full(), [FileTensor(key, "")], tied=True)

    def check(self) -> None:
        """Refuse a file with tensors that nothing read, or that adapts nothing."""
        if self.remaining:
            key = next(iter(self.remaining))
            raise FileError(
                f"the file holds {key!r} (one of {len(self.remaining)} such), and nothing in its config and this model asks "
                "for it: was it made for another model?"
            )
        if not self.methods:
            raise FileError("the config targets nothing in this model; was it made for another one?")


def redrawn(site: Site, method: WeightMethod) -> dict[str, Tensor]:
    """A method's initial tensors, the same every time."""
    with torch.no_grad():
        return method.for_site(site).init_tensors(site, torch.Generator(site.parameter.device).manual_seed(0))


def with_dtype(method: WeightMethod, dtype: torch.dtype, tensors: dict[str, Tensor]) -> WeightMethod:
    """The method with the file's dtype, if it has a field for it and the parameter's dtype is another."""
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    holds = any(field.name == "dtype" for field in fields(method))
    if not holds or len(found) != 1 or found == {dtype}:
        return method
    changes: dict[str, Any] = {"dtype": found.pop()}
    return method.replace(**changes)
