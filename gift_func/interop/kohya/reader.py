"""What a kohya or LyCORIS file's tensors become: a method for each parameter, and the adapter's state."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ...errors import FileError
from ...initialise import Shapes
from ...methods import Diff, LoHa, LoKr, LoRA, Method
from ...network.frozen_base import FrozenBase
from ...select import Regex, Site
from ...strategy import Placement, Strategy
from .methods import Decomposed, is_host
from .module_tensors import ModuleTensors, Tensors
from .table import BIASES, kind_of


class KohyaReader:
    """What a file's tensors become: methods by parameter, and the adapter's state.

    Args:
        base: the base they are for.
    """

    def __init__(self, base: FrozenBase) -> None:
        self.groups = {site.name: group for group in base.sites() for site in group}
        self.state: Tensors = {}
        self.methods: dict[str, Method] = {}

    def read(self, found: ModuleTensors, module_name: str) -> None:
        """Find a place for all that a file holds for one module.

        Raises:
            FileError: if something has none.
        """
        for name in BIASES:
            if name in found.left:
                self.place(self.site(found, module_name, "bias"), Diff(), {"diff": found.take(name)}, found)
        if not found.left:
            return
        site, kind = self.site(found, module_name, "weight"), kind_of(found)
        if not is_host(site.module) and not kind.marks <= {"diff", "w_norm"}:
            raise FileError(
                f"{found.called} holds {kind.label} for {module_name!r}, a {type(site.module).__name__}, and such files adapt "
                "Linear, Conv1d, Conv2d and Conv3d"
            )
        method, tensors = kind.read(found, site)
        self.place(site, method, tensors, found)

    def site(self, found: ModuleTensors, module_name: str, param_name: str) -> Site:
        """The site of a module's weight or bias.

        Raises:
            FileError: if the module has none, or it is tied to another module's.
        """
        name = f"{module_name}.{param_name}" if module_name else param_name
        if name not in self.groups:
            raise FileError(f"{found.called} changes the {param_name} of {module_name!r}, which has none")
        group = self.groups[name]
        site = next(site for site in group if site.name == name)
        others = [other.name for other in group if other.module is not site.module]
        if others:
            raise FileError(
                f"{found.called} adapts {name!r} alone, and in this model it is one with {', '.join(others)}: a tied parameter "
                "stays tied here. Untie them in the model (a copy of the parameter in one place)."
            )
        return site

    def place(self, site: Site, method: Method, tensors: Tensors, found: ModuleTensors) -> None:
        """Adapt a parameter by tensors of the file.

        Raises:
            FileError: if the method cannot adapt it, or a tensor has another size than it asks for.
        """
        if found.left and site.param_name == "weight":
            raise FileError(f"{found.called} also holds {next(iter(found.left))!r}, for which there is no use")
        name = self.groups[site.name][0].name
        if name in self.methods:
            raise FileError(f"the file adapts {name!r} twice, the second time as {found.called}")
        lack = method.why_not(site)
        if lack is not None:
            raise FileError(f"{found.called} would adapt {site.name!r} by {method}, which needs {lack}")
        method = held(method, site.parameter.dtype, tensors)
        bare = replace(site, parameter=torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta"))
        placement = Placement(name, bare, method.for_site(bare), method)
        wanted = Shapes(torch.Generator()).own(placement)
        if wanted.keys() != tensors.keys():
            odd = sorted(wanted.keys() ^ tensors.keys())[0]
            raise FileError(f"{found.called} would adapt {site.name!r} by {method}, which fits the file but for {odd!r}")
        for local, like in wanted.items():
            self.state[placement.full_name(local)] = fitted(tensors[local], like.shape, local, found)
        self.methods[name] = method

    def strategy(self) -> Strategy:
        """The rules that lead to these places."""
        names: dict[Method, list[str]] = {}
        for name, method in self.methods.items():
            names.setdefault(method, []).append(re.escape(name))
        return Strategy([(Regex("|".join(found)), method) for method, found in names.items()])


def held(method: Method, dtype: torch.dtype, tensors: Tensors) -> Method:
    """The method, holding its tensors in the widest of the file's element types if it can and the parameter's is another."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    if isinstance(method, Decomposed):
        return method.replace(of=held(method.of, dtype, tensors))
    return method.replace(dtype=widest) if isinstance(method, (LoRA, LoHa, LoKr)) and widest != dtype else method


def fitted(tensor: Tensor, shape: torch.Size, local: str, found: ModuleTensors) -> Tensor:
    """A file's tensor in our shape, from which it may differ by dimensions of size 1 and by a flattened kernel.

    Raises:
        FileError: if it differs otherwise.
    """
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    flat = tensor.ndim > len(shape) == 2 and tensor.flatten(1).shape == shape
    if not same and not flat:
        raise FileError(f"{found.called} is to have {local} of shape {tuple(shape)}, and has {tuple(tensor.shape)}")
    return tensor.reshape(shape)
