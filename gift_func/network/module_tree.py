"""A private copy of a module's structure: its own modules, dictionaries and flags, somebody else's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import AdaptError
from .copy_tree import clone as clone
from .copy_tree import copy_tree, paths, walk


def _same(tensor: Any) -> Any:
    return tensor


class Buffers(NamedTuple):
    """One module's buffers.

    Attributes:
        tensors: by attribute.
        non_persistent: the attributes of those that are not saved.
    """

    tensors: dict[str, Tensor | None]
    non_persistent: set[str]

    def persistent(self) -> dict[str, Tensor]:
        """Those that are saved."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor is not None and name not in self.non_persistent}


class ModuleTree:
    """One private copy of a module tree, and where each parameter stands in it.

    Attributes:
        module: the private root module.
        modules: every module of the tree once, by its first dotted name.
        places: for every parameter's first dotted name, the modules and attributes that hold it: more than one
            where the parameter is tied.
        written: the parameters that the network writes to in its own forward.
    """

    def __init__(self, module: nn.Module, modules: dict[str, nn.Module] | None = None) -> None:
        self.module = module
        self.modules = walk(module) if modules is None else modules
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        first: dict[int, list[tuple[nn.Module, str]]] = {}
        for module_name, child in self.modules.items():
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    places = first.get(id(parameter))
                    if places is None:
                        name = f"{module_name}.{attribute}" if module_name else attribute
                        first[id(parameter)] = self.places[name] = [(child, attribute)]
                    else:
                        places.append((child, attribute))
        writers = _written_by(self.modules.values())
        self.written = {name for name in self.places if id(self.tensor(name)) in writers} if writers else set()

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """For every parameter's first dotted name, all dotted names that lead to it."""
        first = {(id(child), attribute): name for name, places in self.places.items() for child, attribute in places}
        found: dict[str, list[str]] = {name: [] for name in self.places}
        for module_name, child in paths(self.module).items():
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    found[first[id(child), attribute]].append(join(module_name, attribute))
        return found

    @staticmethod
    def of(modules: dict[str, nn.Module]) -> ModuleTree:
        """The private copy of a user's module: parameters are frozen aliases, buffers are clones.

        Args:
            modules: the module and all in it, as `walk` gives them.

        Raises:
            AdaptError: for a scripted module, an uninitialised lazy one, or an attribute that cannot be copied.
        """
        _refuse(modules)
        writers = _written_by(modules.values())

        def frozen(parameter: nn.Parameter) -> nn.Parameter:
            alias = parameter.detach()
            return nn.Parameter(alias.clone() if id(parameter) in writers else alias, requires_grad=False)

        return ModuleTree(*copy_tree(modules, frozen, clone))

    def copy(self, buffer_of: Callable[[Tensor], Tensor] = _same) -> ModuleTree:
        """Another private copy, with the same parameters.

        Args:
            buffer_of: what the copy holds for a buffer; by default the very same one.
        """
        return ModuleTree(*copy_tree(walk(self.module), _same, buffer_of))

    def holding(self, buffers: Mapping[str, Buffers]) -> ModuleTree:
        """Another private copy, with the same parameters and with these buffers in the places of its own."""
        mine = named(buffers)
        given = {id(tensor): mine[name] for name, tensor in named(self.held()).items()}
        made = self.copy(lambda buffer: given[id(buffer)])
        made.hold(buffers)
        return made

    def hold(self, buffers: Mapping[str, Buffers]) -> None:
        """Put these buffers, in these very dictionaries, in the places of its own."""
        for name, (tensors, non_persistent) in buffers.items():
            vars(self.modules[name]).update(_buffers=tensors, _non_persistent_buffers_set=non_persistent)

    def detached(self, parameter_of: Callable[[Any], Tensor] = _same) -> nn.Module:
        """A module that shares nothing with this copy but what `parameter_of` makes of each parameter."""
        return copy_tree(walk(self.module), parameter_of, clone).root

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

    def held(self) -> dict[str, Buffers]:
        """The buffers, in the very dictionaries that hold them, by the first dotted name of their module."""
        return {
            name: Buffers(module._buffers, module._non_persistent_buffers_set)
            for name, module in self.modules.items()
            if module._buffers
        }


def copied(held: Mapping[str, Buffers], source: Mapping[str, Tensor] | None = None) -> dict[str, Buffers]:
    """Copies of buffers, in dictionaries of their own; what one tensor was, one tensor is again.

    Args:
        held: the buffers, as `ModuleTree.held` gives them.
        source: values for some of them, by global names; the copies have the element type and device of `held` still.
    """
    made: dict[str, Buffers] = {}
    known: dict[int, Tensor] = {}
    for module_name, (tensors, non_persistent) in held.items():
        own: dict[str, Tensor | None] = {}
        for attribute, tensor in tensors.items():
            own[attribute] = None
            if tensor is not None:
                origin = tensor if source is None else source.get(join(module_name, attribute), tensor)
                if id(origin) not in known:
                    known[id(origin)] = clone(origin.to(tensor))
                own[attribute] = known[id(origin)]
        made[module_name] = Buffers(own, set(non_persistent))
    return made


def named(held: Mapping[str, Buffers]) -> dict[str, Tensor]:
    """Buffers by their global names."""
    return {
        join(module_name, attribute): tensor
        for module_name, (tensors, _) in held.items()
        for attribute, tensor in tensors.items()
        if tensor is not None
    }


def persistent(held: Mapping[str, Buffers]) -> dict[str, Tensor]:
    """The persistent buffers, by their global names."""
    return {
        join(module_name, attribute): tensor
        for module_name, buffers in held.items()
        for attribute, tensor in buffers.persistent().items()
    }


def join(module_name: str, attribute: str) -> str:
    """The dotted name of a module's attribute; the root module's name is empty."""
    return f"{module_name}.{attribute}" if module_name else attribute


def _refuse(modules: Mapping[str, nn.Module]) -> None:
    scripted = {kind for kind in {type(child) for child in modules.values()} if issubclass(kind, torch.jit.ScriptModule)}
    for name, child in modules.items():
        if type(child) in scripted:
            raise AdaptError(
                f"{name or 'the model'} is a scripted module, whose weights cannot be exchanged. Adapt the Python module "
                "it was made from, and script merge()'s result."
            )
        for attribute, parameter in child._parameters.items():
            if type(parameter) is not nn.Parameter and parameter is not None and is_lazy(parameter):
                raise AdaptError(
                    f"{join(name, attribute)} of {type(child).__name__} is not initialised yet, so it has no shape. Run "
                    "the model once on a real input, then adapt it."
                )


def _written_by(modules: Iterable[nn.Module]) -> set[int]:
    """The parameters, by identity, that modules write to in their own forward."""
    return {
        id(module.weight)
        for module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
