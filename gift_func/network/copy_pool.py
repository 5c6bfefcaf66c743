"""Private copies of a frozen base's modules: one that rests between calls, others that are lent to one call each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from .._torch import constant_in_graphs, lasting_outside, without_modes
from ..weights.call import Call, calling
from .frozen_base import FrozenBase
from .modes import Modes, modes_of, set_modes
from .module_tree import Buffers, ModuleTree, clone, copied
from .snapshot import Snapshot

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class PooledCopy:
    """A copy that is lent to one call at a time.

    Attributes:
        tree: the copy.
        source: what the resting copy held when this one was made of it.
        own: what this one held then.
        buffers: the modules that hold buffers, of the resting copy and of this one.
    """

    tree: ModuleTree
    source: Snapshot
    own: Snapshot
    buffers: list[tuple[nn.Module, nn.Module]]


class CopyPool:
    """Private copies of a frozen base's modules, of which every call under way has one to itself.

    The resting copy is made at its first use unless one is given: many an adapter is only loaded to be stacked, put into a
    bank or saved again, and a copy costs more than all the rest of it. The base's module tree is private and never runs, so
    a copy made later is the same; threads that need it at once wait for one. Buffers are there from the start, since they
    are part of a model's state.

    Args:
        base: the frozen base.
        tree: the resting copy; None for one of the base's that is made at first use.
        buffers: for a copy that is to be made, its private buffers; None for copies of the base's.
        modes: training modes that a copy of the base's is put in, one after the other.

    Attributes:
        base: the frozen base.
        buffers: the private buffers, in the dictionaries in which the resting copy's modules hold them.
        modes: the training modes that a copy of the base's is put in, one after the other.
    """

    def __init__(
        self,
        base: FrozenBase,
        tree: ModuleTree | None = None,
        buffers: dict[str, Buffers] | None = None,
        modes: Sequence[bool] = (),
    ) -> None:
        self.base = base
        self.modes = list(modes)
        self.lock = threading.RLock()
        self._own = tree
        self._is_of_base = tree is None
        self._when_made: WeakMethod[Callable[[ModuleTree], None]] | None = None
        self._bound: Tensors = {}
        self._spare: list[PooledCopy] = []
        if tree is not None:
            self.buffers = tree.held()
        else:
            self.buffers = copied(base.tree.held()) if buffers is None else buffers

    # --- the resting copy

    @property
    def tree(self) -> ModuleTree:
        """The resting copy."""
        own = self._own
        return self._made() if own is None else own

    @property
    def module(self) -> nn.Module:
        """The root of the resting copy."""
        return self.tree.module

    @property
    def is_made(self) -> bool:
        """Whether the resting copy is there; if not, nobody can have changed anything in it."""
        return self._own is not None

    @property
    def outline(self) -> ModuleTree:
        """Which modules and parameters there are, only to be read: tensors and training modes may be others than the copy's."""
        return self.base.tree if self._own is None else self._own

    @constant_in_graphs
    def ready(self) -> bool:
        """Make the resting copy now. Dynamo runs this where it could not trace the making."""
        return self.tree is not None

    def when_made(self, function: Callable[[ModuleTree], None]) -> None:
        """Call a method with the resting copy, before anybody uses it; at once if it is made already."""
        self._when_made = WeakMethod(function)  # it is an object's that has this pool, and both are to go at once
        if self._own is not None:
            function(self._own)

    def bind(self, tree: ModuleTree, tensors: Tensors) -> None:
        """Put tensors in the places of the resting copy's parameters, to stay there between calls."""
        for name, tensor in tensors.items():
            tree.bind(name, tensor)
        self._bound = tensors
        self._spare = []

    def rebase(self, base: FrozenBase) -> None:
        """Exchange the base for a moved or cast one."""
        with self.lock:
            if base is not self.base and self._own is not None:
                names = {id(tensor): name for name, tensor in self.base.tensors.items()}
                for name in self._own.places:
                    origin = names.get(id(self._own.tensor(name)))
                    if origin is not None:
                        self._own.bind(name, base.tensors[origin])
            self.base = base

    def fork(self, buffers: dict[str, Buffers] | None = None, *, of_base: bool = False) -> CopyPool:
        """Another pool of the same network, in the same modes.

        Args:
            buffers: its private buffers; None for copies of this one's.
            of_base: make the new resting copy of the base where the network is the base's, whatever calls or users left
                in this one's attributes.
        """
        buffers = copied(self.buffers) if buffers is None else buffers
        if self._own is None or (of_base and self._is_of_base):
            return CopyPool(self.base, None, buffers, self.modes)
        return CopyPool(self.base, self._own.holding(buffers))

    def _made(self) -> ModuleTree:
        with self.lock, lasting_outside(), without_modes():
            if self._own is None:
                tree = self.base.tree.holding(self.buffers)
                for mode in self.modes:
                    tree.module.train(mode)
                function = None if self._when_made is None else self._when_made()
                if function is not None:
                    function(tree)
                self._own = tree  # last: other threads look for it without the lock
            return self._own

    # --- training modes

    @property
    def is_undecided(self) -> bool:
        """Whether it takes making the copy to know which modules are in training mode, since some set theirs themselves."""
        return self._own is None and bool(self.modes) and not self.base.has_plain_modes

    @property
    def mode(self) -> bool:
        """The mode that the network was put in last, whatever its own `train` made of it."""
        return self.modes[-1] if self.modes and self._own is None else self.training

    @property
    def training(self) -> bool:
        """Whether the network is in training mode."""
        if torch.compiler.is_compiling():
            self.ready()  # before anything is asked of what that changes, which Dynamo would take for given
        return self.trains("")

    def trains(self, module_name: str) -> bool:
        """Whether a module is in training mode."""
        if self.is_undecided:
            self.ready()
        if self._own is None and self.modes:
            return self.modes[-1]
        return self.outline.modules[module_name].training

    def train(self, mode: bool) -> None:
        """Set the training mode of the resting copy, or of the one that will be made."""
        with self.lock:
            if self.base.has_plain_modes:
                self.modes = [mode]
            elif self._own is None:
                self.modes.append(mode)
            else:
                self._is_of_base = False  # what else that does, only this copy knows
            if self._own is not None:
                self._own.module.train(mode)

    def current_modes(self) -> Modes | bool:
        """The modes of those modules that the base has too; or the one that all are yet to be put in."""
        if self.is_undecided:
            return self.modes[-1]
        return frozenset(name for name in self.base.tree.modules if name in self.outline.modules and self.trains(name))

    def set_modes(self, modes: Modes | bool) -> None:
        """Put the resting copy's modules in these modes, unless they are in them."""
        with self.lock:
            if modes_of(self.tree) != modes:
                set_modes(self.tree, modes)

    # --- copies for one call

    @contextmanager
    def checkout(self, bindings: Tensors, buffers: Tensors, private_buffers: bool) -> Iterator[tuple[PooledCopy, Call]]:
        """A copy with these tensors in the places of parameters, to this call alone.

        It is used again by a later call unless this one changed its attributes, or met a checkpoint: that will run parts
        of the copy again in backward and must find the same tensors there, so the copy is left to it; as it is to a
        forward that is a generator and has yet to run.

        Args:
            bindings: what stands in the places of parameters, by their names.
            buffers: what stands in the places of buffers, by their global names.
            private_buffers: whether the other buffers are copies, or the resting copy's own.
        """
        with calling() as call:
            found = self._lease()
            for source, target in found.buffers:
                for attribute, buffer in source._buffers.items():
                    target._buffers[attribute] = buffer if buffer is None or not private_buffers else clone(buffer)
            for name, buffer in buffers.items():
                module_name, _, attribute = name.rpartition(".")
                found.tree.modules[module_name]._buffers[attribute] = buffer
            for name, tensor in bindings.items():
                found.tree.bind(name, tensor)
            yield found, call
            if not (call.checkpointed or call.outlived) and found.own.holds():
                for name in bindings:
                    found.tree.bind(name, self._bound[name] if name in self._bound else self.base.tensors[name])
                self._spare.append(found)

    def _lease(self) -> PooledCopy:
        while self._spare:
            try:
                found = self._spare.pop()
            except IndexError:  # another thread took the last one
                break
            if found.source.holds():
                return found
        resting = self.tree
        tree = resting.copy()
        pairs = zip(resting.modules.values(), tree.modules.values(), strict=True)
        buffers = [(mine, other) for mine, other in pairs if mine._buffers]
        source, own = (Snapshot(found.modules.values()) for found in (resting, tree))
        return PooledCopy(tree, source, own, buffers)
