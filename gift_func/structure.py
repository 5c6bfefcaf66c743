"""A private copy of a module's structure: its own modules, dictionaries and flags, somebody else's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import AdaptError
from .replica import clone as clone
from .replica import replica, walk


def _same(tensor: Any) -> Any:
    return tensor


class Structure:
    """One private copy of a module tree, and where each parameter stands in it.

    Attributes:
        module: the private root module.
        modules: every module of the tree once, by its first dotted name.
        places: for every parameter's first dotted name, the modules and attributes that hold it: more than one
            where the parameter is tied.
        written: the parameters that the network writes to in its own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = walk(module)
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        first: dict[int, str] = {}
        for module_name, child in self.modules.items():
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    name = first.get(id(parameter))
                    if name is None:
                        name = first[id(parameter)] = join(module_name, attribute)
                        self.places[name] = []
                    self.places[name].append((child, attribute))
        writers = {id(parameter) for child in self.modules.values() for parameter in _written_by(child)}
        self.written = {name for name in self.places if id(self.tensor(name)) in writers}

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """For every parameter's first dotted name, all dotted names that lead to it."""
        first = {(id(child), attribute): name for name, places in self.places.items() for child, attribute in places}
        found: dict[str, list[str]] = {name: [] for name in self.places}
        for module_name, child in self.module.named_modules(remove_duplicate=False):
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    found[first[id(child), attribute]].append(join(module_name, attribute))
        return found

    @staticmethod
    def of(module: nn.Module) -> Structure:
        """The private copy of a user's module: parameters are frozen aliases, buffers are clones.

        Raises:
            AdaptError: for a scripted module, an uninitialised lazy one, or an attribute that cannot be copied.
        """
        modules = walk(module)
        _refuse(modules)
        writers = {id(p) for child in modules.values() for p in _written_by(child)}

        def frozen(parameter: nn.Parameter) -> nn.Parameter:
            alias = parameter.detach()
            return nn.Parameter(alias.clone() if id(parameter) in writers else alias, requires_grad=False)

        return Structure(replica(module, frozen, clone))

    def copy(self, buffer_of: Callable[[Tensor], Tensor] = _same) -> Structure:
        """Another private copy, with the same parameters.

        Args:
            buffer_of: what the copy holds for a buffer; by default the very same one.
        """
        return Structure(replica(self.module, _same, buffer_of))

    def detached(self, parameter_of: Callable[[Any], Tensor] = _same) -> nn.Module:
        """A module that shares nothing with this copy but what `parameter_of` makes of each parameter."""
        return replica(self.module, parameter_of, clone)

    def tensor(self, name: str) -> nn.Parameter:
        """What stands in a parameter's place."""
        module, attribute = self.places[name][0]
        found = module._parameters[attribute]
        assert found is not None
        return found

    def bind(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in a parameter's place, wherever the parameter is tied to."""
        for module, attribute in self.places[name]:
            # Not every tensor that may stand here is a Parameter, which is what the annotation of torch asks for.
            module._parameters[attribute] = tensor  # type: ignore[assignment]

    def buffers(self) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
        """Every buffer once: its dotted name, its attribute, the module that holds it, its tensor."""
        for module_name, module in self.modules.items():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    yield join(module_name, attribute), attribute, module, buffer

    @property
    def buffer_names(self) -> set[str]:
        """The dotted names of all buffers."""
        return {name for name, *_ in self.buffers()}


def join(module_name: str, attribute: str) -> str:
    """The dotted name of a module's attribute; the root module's name is empty."""
    return f"{module_name}.{attribute}" if module_name else attribute


def _refuse(modules: Mapping[str, nn.Module]) -> None:
    for name, child in modules.items():
        if isinstance(child, torch.jit.ScriptModule):
            raise AdaptError(
                f"{name or 'the model'} is a scripted module, whose weights cannot be exchanged. Adapt the Python module "
                "it was made from, and script merge()'s result."
            )
        for attribute, parameter in child._parameters.items():
            if parameter is not None and is_lazy(parameter):
                raise AdaptError(
                    f"{join(name, attribute)} of {type(child).__name__} is not initialised yet, so it has no shape. Run "
                    "the model once on a real input, then adapt it."
                )


def _written_by(module: nn.Module) -> list[Tensor]:
    """The parameters that a module writes to in its own forward."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return [module.weight]
    return []
