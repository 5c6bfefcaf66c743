"""The adapter as a value: a frozen base, adapted parameters, and their tensors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any, overload

import torch
from torch import Tensor, nn

from ._torch import lasting_outside
from .adapter_dict import NameSpace
from .methods import WeightMethod
from .network.copy_pool import CopyPool
from .network.frozen_base import FrozenBase
from .network.module_tree import Modes, ModuleTree, NamedTensors, clone, persistent_buffers, set_buffer
from .network.runner import has_computed
from .strategy import Strategy
from .weights import Dense, Weight


@dataclass(frozen=True)
class AdaptedParameter:
    """One adapted parameter.

    Attributes:
        name: the parameter's dotted name.
        method: the method, as `for_site` gave it for the parameter's site.
        names: the method's own name of each tensor -> its global name.
    """

    name: str
    method: WeightMethod
    names: dict[str, str]


class AdaptedParameters(Sequence[AdaptedParameter]):
    """The adapted parameters of a base: makes structured weights from adapter tensors.

    Args:
        base: the frozen base.
        parameters: the adapted parameters.

    Attributes:
        names: the parameters' dotted names.
    """

    def __init__(self, base: FrozenBase, parameters: Sequence[AdaptedParameter]) -> None:
        self.base = base
        self.names = tuple(parameter.name for parameter in parameters)
        self._parameters = tuple(parameters)
        self._epoch = -1
        self._precomputed: dict[str, dict[str, Tensor]] = {}

    @overload
    def __getitem__(self, index: int) -> AdaptedParameter: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AdaptedParameter, ...]: ...
    def __getitem__(self, index: int | slice) -> AdaptedParameter | tuple[AdaptedParameter, ...]:
        return self._parameters[index]

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[AdaptedParameter]:
        return iter(self._parameters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdaptedParameters) and self._parameters == other._parameters

    def __hash__(self) -> int:
        return hash(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return AdaptedParameters, (self.base, self._parameters)

    def on(self, base: FrozenBase) -> AdaptedParameters:
        """The same parameters of a base that was moved or cast, or of another that shares this one's tensors."""
        return self if base is self.base else AdaptedParameters(base, self._parameters)

    def refresh(self) -> None:
        """Look up the tensors that methods precompute from the base, unless they are those of the base's present values."""
        if self._epoch != self.base.epoch:
            self._precomputed = {
                parameter.name: self.base.precomputed(parameter.name, parameter.method)
                for parameter in self._parameters
                if parameter.name in self.base.weights
            }
            self._epoch = self.base.epoch

    def weights(self, tensors: NamedTensors, trains: Callable[[str], bool]) -> dict[str, Weight]:
        """The structured weights of the base and adapter tensors, by parameter name.

        Args:
            tensors: the adapter's tensors, by global name.
            trains: returns whether the module of a dotted name is in training mode.
        """
        self.refresh()
        made: dict[str, Weight] = {}
        for parameter in self._parameters:
            name = parameter.name
            by_local_name = {local: tensors[full] for local, full in parameter.names.items()}
            if name in self.base.weights:
                weight = parameter.method.weight(self.base.weights[name], {**self._precomputed[name], **by_local_name})
                made[name] = weight if trains(name.rpartition(".")[0]) else weight.eval()
            else:  # a parameter of a module that the adapter adds
                made[name] = Dense(by_local_name[""])
        return made


@dataclass(eq=False)
class Adapter:
    """An adapter: adapted parameters and their tensors, without a copy of the network.

    Attributes:
        parameters: the adapted parameters, with their frozen base.
        strategy: the strategy, or None where actions of GIFt's protocol replaced modules.
        tensors: the adapter's tensors under global names: parameters, or views of stacked ones.
        buffers: the persistent buffers that differ from the base's.
        tree: the network with the modules that the adapter adds; None if it adds none.
    """

    parameters: AdaptedParameters
    strategy: Strategy | None
    tensors: NamedTensors
    buffers: dict[str, Tensor] = field(default_factory=dict)
    tree: ModuleTree | None = None
    _versions: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _weights: dict[Modes, tuple[int, dict[str, Weight]]] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> FrozenBase:
        """The frozen base."""
        return self.parameters.base

    def replace_tensors(self, tensors: NamedTensors, base: FrozenBase | None = None) -> Adapter:
        """The same adapter with other tensors, on the same base or another that shares its tensors."""
        if base is not None and base is not self.base:
            base.adopt_precomputed(self.base)
        parameters = self.parameters if base is None else self.parameters.on(base)
        return Adapter(parameters, self.strategy, tensors, dict(self.buffers), self.tree)

    def copy(self, trained: Container[str] | None = None) -> Adapter:
        """The same adapter with copies of its tensors, buffers and modules.

        Args:
            trained: the names of the tensors whose copies require grad; None for those that do here.
        """
        with lasting_outside():
            tensors = {
                name: nn.Parameter(clone(tensor), requires_grad=tensor.requires_grad if trained is None else name in trained)
                for name, tensor in self.tensors.items()
            }
            buffers = {name: clone(buffer) for name, buffer in self.buffers.items()}
            tree = None if self.tree is None else self.tree.copy(clone)
        return Adapter(self.parameters, self.strategy, tensors, buffers, tree)

    def weights(self, modes: Modes) -> dict[str, Weight]:
        """The structured weights by parameter name. They are cached if no method computes a tensor for them.

        Args:
            modes: the modules in training mode.
        """
        known = self._weights.get(modes)
        if known is not None and known[0] == self.base.epoch:
            return known[1]
        with lasting_outside(), torch.enable_grad():
            made = self.parameters.weights(self.tensors, modes.__contains__)
        if not has_computed(made, self.tensors.values()):
            self._weights[modes] = self.base.epoch, made
        return made

    def has_cached_weights(self, modes: Modes) -> bool:
        """Whether the weights that `weights` returned last are cached."""
        return modes in self._weights

    def clear_cached_weights(self) -> None:
        """Make new weights from now on, since the tensors were moved in memory."""
        self._weights.clear()

    @cached_property
    def reference(self) -> weakref.ref[Adapter]:
        """A weak reference to this adapter, by which caches find what they have for it."""
        return weakref.ref(self)

    @cached_property
    def module(self) -> nn.Module:
        """The tensors and buffers as a module, whose dictionaries are this adapter's own."""
        made = NameSpace()
        vars(made).update(_parameters=self.tensors, _buffers=self.buffers)
        return made

    def copy_pool(self) -> CopyPool:
        """Private copies of the network for a model of this adapter, with this adapter's own buffers."""
        tree = None
        if self.tree is not None:
            tree = ModuleTree(self.tree.detached())
            for name in (tree.places.keys() & self.base.tensors.keys()) - set(self.parameters.names):
                tree.bind(name, self.base.tensors[name])
        pool = CopyPool(self.base, tree)
        for name, buffer in self.buffers.items():
            set_buffer(pool.buffers, name, buffer)
        return pool

    # --- in a mixed batch

    @property
    def why_apart(self) -> str | None:
        """Why the adapter cannot run in one pass with others, or None."""
        if self.tree is not None:
            return "it brings modules of its own"
        versions = self._versions
        if any(name not in versions or tensor._version != versions[name] for name, tensor in self.buffers.items()):
            return "it keeps buffers of its own"
        return None

    @property
    def address(self) -> int:
        """The memory address of its first tensor."""
        return next((tensor.data_ptr() for tensor in self.tensors.values()), 0)

    def add_buffers(self) -> None:
        """Add copies of all persistent buffers of the base, which the adapter's models share and write to."""
        with self._lock:
            for name, buffer in persistent_buffers(self.base.tree.buffer_dicts()).items():
                if name not in self.buffers:
                    with lasting_outside():
                        copy = clone(buffer)
                    self._versions[name] = copy._version
                    self.buffers[name] = copy

    def __reduce__(self) -> tuple[Any, ...]:
        module = None
        if self.tree is not None:
            tree = self.tree.copy()
            for name in tree.places:
                found = self.tensors.get(name, self.base.tensors.get(name))
                if found is not None:
                    tree.bind(name, found)
            module = tree.module
        return Adapter._unpickled, (module, self.parameters, self.strategy, self.tensors, self.buffers)

    @staticmethod
    def _unpickled(module: nn.Module | None, *fields: Any) -> Adapter:
        made = Adapter(*fields)
        made.tree = None if module is None else ModuleTree(module)
        return made


def adds_modules(tree: ModuleTree, base: ModuleTree) -> bool:
    """Whether a network's modules have other classes or other parameters than the base's."""
    ours, theirs = tree.modules, base.modules
    if ours.keys() != theirs.keys() or tree.names.keys() != base.names.keys():
        return True
    return not all(map(is_, map(type, ours.values()), (type(theirs[name]) for name in ours)))
