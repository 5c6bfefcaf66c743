"""A private copy of a model's modules, with an index of its parameters."""

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

NamedTensors = Mapping[str, Tensor]
"""Tensors by their global names."""

Modes = frozenset[str]
"""The dotted names of the modules in training mode; they may differ, as where a BatchNorm is frozen."""


class ModuleBuffers(NamedTuple):
    """One module's buffers.

    Attributes:
        tensors: by attribute.
        non_persistent: the attributes of those that are not saved.
    """

    tensors: dict[str, Tensor | None]
    non_persistent: set[str]


class ModuleTree:
    """One private copy of a module tree, with an index of its parameters.

    Attributes:
        module: the private root module.
        modules: every module of the tree once, by its first dotted name.
        places: for every parameter's first dotted name, the modules and attributes where it is found: more than one where
            the parameter is tied.
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
        """For every parameter's first dotted name, all its dotted names."""
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

    def copy(self, buffer_of: Callable[[Tensor], Tensor] = lambda buffer: buffer) -> ModuleTree:
        """Another private copy, with the same parameters.

        Args:
            buffer_of: returns the copy's buffer for one of this tree's; by default the same buffer.
        """
        return ModuleTree(*copy_tree(walk(self.module), lambda parameter: parameter, buffer_of))

    def copy_with_buffers(self, buffers: Mapping[str, ModuleBuffers]) -> ModuleTree:
        """Another private copy, with the same parameters and with these buffers in the places of its own."""
        new = named_buffers(buffers)
        new_of = {id(tensor): new[name] for name, tensor in named_buffers(self.buffer_dicts()).items()}
        made = self.copy(lambda buffer: new_of[id(buffer)])
        made.set_buffer_dicts(buffers)
        return made

    def set_buffer_dicts(self, buffers: Mapping[str, ModuleBuffers]) -> None:
        """Make these dictionaries the modules' own dictionaries of buffers."""
        for name, (tensors, non_persistent) in buffers.items():
            vars(self.modules[name]).update(_buffers=tensors, _non_persistent_buffers_set=non_persistent)

    def modes(self) -> Modes:
        """The modules in training mode."""
        return frozenset(name for name, module in self.modules.items() if module.training)

    def set_modes(self, modes: Modes | bool) -> None:
        """Set the mode of each module, or one for all by the network's own `train`."""
        if isinstance(modes, bool):
            self.module.train(modes)
            return
        for name, module in self.modules.items():
            module.training = name in modes

    def detached(self, parameter_of: Callable[[Any], Tensor] = lambda parameter: parameter) -> nn.Module:
        """A copy that shares nothing with this tree except what `parameter_of` returns for each parameter."""
        return copy_tree(walk(self.module), parameter_of, clone)[0]

    def tensor(self, name: str) -> nn.Parameter:
        """The tensor that is bound in a parameter's place."""
        module, attribute = self.places[name][0]
        found = module._parameters[attribute]
        assert found is not None
        return found

    def bind(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in a parameter's place, or all places of a tied one."""
        for module, attribute in self.places[name]:
            # A slot is no Parameter, which is what torch annotates.
            module._parameters[attribute] = tensor  # type: ignore[assignment]

    def buffers(self) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
        """Every buffer once: its dotted name, its attribute, its module, its tensor."""
        for module_name, module in self.modules.items():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    yield join(module_name, attribute), attribute, module, buffer

    def buffer_dicts(self) -> dict[str, ModuleBuffers]:
        """The modules' own dictionaries of buffers, by the first dotted name of their module."""
        return {
            name: ModuleBuffers(module._buffers, module._non_persistent_buffers_set)
            for name, module in self.modules.items()
            if module._buffers
        }


def copy_buffers(dicts: Mapping[str, ModuleBuffers], source: NamedTensors | None = None) -> dict[str, ModuleBuffers]:
    """Copies of buffers, in new dictionaries; modules that share a buffer share its copy.

    Args:
        dicts: the buffers, as `ModuleTree.buffer_dicts` gives them.
        source: values for some of them, by global names; the copies keep the dtype and device of `dicts`.
    """
    made: dict[str, ModuleBuffers] = {}
    known: dict[int, Tensor] = {}
    for module_name, (tensors, non_persistent) in dicts.items():
        copies: dict[str, Tensor | None] = {}
        for attribute, tensor in tensors.items():
            copies[attribute] = None
            if tensor is not None:
                origin = tensor if source is None else source.get(join(module_name, attribute), tensor)
                if id(origin) not in known:
                    known[id(origin)] = clone(origin.to(tensor))
                copies[attribute] = known[id(origin)]
        made[module_name] = ModuleBuffers(copies, set(non_persistent))
    return made


def named_buffers(dicts: Mapping[str, ModuleBuffers]) -> dict[str, Tensor]:
    """Buffers by their global names."""
    return {
        join(module_name, attribute): tensor
        for module_name, (tensors, _) in dicts.items()
        for attribute, tensor in tensors.items()
        if tensor is not None
    }


def persistent_buffers(dicts: Mapping[str, ModuleBuffers]) -> dict[str, Tensor]:
    """The persistent buffers by their global names."""
    left_out = {join(module_name, attribute) for module_name, (_, names) in dicts.items() for attribute in names}
    return {name: tensor for name, tensor in named_buffers(dicts).items() if name not in left_out}


def set_buffer(dicts: Mapping[str, ModuleBuffers], name: str, tensor: Tensor) -> None:
    """Replace the buffer of a global name."""
    module_name, _, attribute = name.rpartition(".")
    dicts[module_name].tensors[attribute] = tensor


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
