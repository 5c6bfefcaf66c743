"""What a kohya or LyCORIS file's tensors become: a method for each parameter, and the adapter's state."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ...errors import FileError
from ...initialise import Shapes
from ...methods import Diff, LoHa, LoKr, LoRA, WeightMethod
from ...network.frozen_base import FrozenBase
from ...select import Site
from ...strategy import Placement
from .formats import BIASES, format_of
from .methods import Decomposed, is_host
from .module_tensors import ModuleTensors, TensorDict


class KohyaReader:
    """Turns a file's tensors into methods, by parameter, and an adapter's state."""

    def __init__(self, base: FrozenBase) -> None:
        self.groups = {site.name: group for group in base.sites() for site in group}
        self.state: TensorDict = {}
        self.methods: dict[str, WeightMethod] = {}

    def read(self, source: ModuleTensors, module_name: str) -> None:
        """Read all tensors of one module."""
        for name in BIASES:
            if name in source.remaining:
                self.place(self.site(source, module_name, "bias"), Diff(), {"diff": source.take(name)}, source)
        if not source.remaining:
            return
        site, form = self.site(source, module_name, "weight"), format_of(source)
        if not is_host(site.module) and not form.marks <= {"diff", "w_norm"}:
            raise FileError(
                f"{source.name} holds {form.label} for {module_name!r}, a {type(site.module).__name__}, and such files adapt "
                "Linear, Conv1d, Conv2d and Conv3d"
            )
        method, tensors = form.read(source, site)
        self.place(site, method, tensors, source)

    def site(self, source: ModuleTensors, module_name: str, param_name: str) -> Site:
        """The site of a module's weight or bias, which must be there and not be tied to another module's."""
        name = f"{module_name}.{param_name}" if module_name else param_name
        if name not in self.groups:
            raise FileError(f"{source.name} changes the {param_name} of {module_name!r}, which has none")
        group = self.groups[name]
        site = next(site for site in group if site.name == name)
        others = [other.name for other in group if other.module is not site.module]
        if others:
            raise FileError(
                f"{source.name} adapts {name!r} alone, and in this model it is one with {', '.join(others)}: a tied parameter "
                "stays tied here. Untie them in the model (a copy of the parameter in one place)."
            )
        return site

    def place(self, site: Site, method: WeightMethod, tensors: TensorDict, source: ModuleTensors) -> None:
        """Set the method of a parameter and its tensors, which must be of the names and sizes of the method's own."""
        if source.remaining and site.param_name == "weight":
            raise FileError(f"{source.name} also holds {next(iter(source.remaining))!r}, for which there is no use")
        name = self.groups[site.name][0].name
        if name in self.methods:
            raise FileError(f"the file adapts {name!r} twice, the second time as {source.name}")
        lack = method.why_not(site)
        if lack is not None:
            raise FileError(f"{source.name} would adapt {site.name!r} by {method}, which needs {lack}")
        method = with_widest_dtype(method, site.parameter.dtype, tensors)
        bare = replace(site, parameter=torch.empty_like(site.parameter, device="meta"))
        placement = Placement(name, bare, method.for_site(bare), method)
        wanted = Shapes(torch.Generator()).own(placement)
        if wanted.keys() != tensors.keys():
            odd = sorted(wanted.keys() ^ tensors.keys())[0]
            raise FileError(f"{source.name} would adapt {site.name!r} by {method}, which fits the file but for {odd!r}")
        for local, like in wanted.items():
            self.state[placement.full_name(local)] = reshaped_to(tensors[local], like.shape, local, source)
        self.methods[name] = method


def with_widest_dtype(method: WeightMethod, dtype: torch.dtype, tensors: TensorDict) -> WeightMethod:
    """The method with the widest of the tensors' dtypes, if it has a field for it and the parameter's dtype is another."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    if isinstance(method, Decomposed):
        return method.replace(of=with_widest_dtype(method.of, dtype, tensors))
    return method.replace(dtype=widest) if isinstance(method, (LoRA, LoHa, LoKr)) and widest != dtype else method


def reshaped_to(tensor: Tensor, shape: torch.Size, local: str, source: ModuleTensors) -> Tensor:
    """A file's tensor in the method's shape, from which it may differ by axes of size 1 and by a flattened kernel only."""
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    flat = tensor.ndim > len(shape) == 2 and tensor.flatten(1).shape == shape
    if not same and not flat:
        raise FileError(f"{source.name} is to have {local} of shape {tuple(shape)}, and has {tuple(tensor.shape)}")
    return tensor.reshape(shape)
