"""Private copies of a frozen base's modules: the main copy, and others that are given to one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

from .._torch import constant_in_graphs, lasting_outside, without_modes
from ..weights.call import Call, calling
from .frozen_base import FrozenBase
from .module_tree import Modes, ModuleBuffers, ModuleTree, NamedTensors, clone, copy_buffers
from .snapshot import Snapshot


@dataclass(frozen=True)
class PooledCopy:
    """A copy that one call at a time runs on.

    Attributes:
        tree: the copy.
        source: the attributes of the main copy's modules when this one was made.
        initial: the attributes of its own modules then.
        buffers: the modules that have buffers, of the main copy and of this one.
    """

    tree: ModuleTree
    source: Snapshot
    initial: Snapshot
    buffers: list[tuple[nn.Module, nn.Module]]


class CopyPool:
    """Private copies of a frozen base's modules, of which every call under way has one to itself.

    The main copy, whose attributes users can reach, is made at its first use unless one is given: many adapters are only
    loaded to be stacked, added to a bank or saved again, and a copy costs more than all the rest of a model. The base's
    module tree is private and never runs, so a copy made later is the same; threads that need it at once wait for one.
    Buffers exist from the start, since they are part of a model's state.

    Args:
        base: the frozen base.
        tree: the main copy; None for a copy of the base's that is made at first use.
        buffers: for a copy that is to be made, its private buffers; None for copies of the base's.
        modes: for a copy that is to be made, the training modes that it is put in, one after the other, since the network's
            own `train` may do more than setting them.

    Attributes:
        buffers: the private buffers, in the main copy's own dictionaries.
    """

    def __init__(
        self,
        base: FrozenBase,
        tree: ModuleTree | None = None,
        buffers: dict[str, ModuleBuffers] | None = None,
        modes: Sequence[bool] = (),
    ) -> None:
        self.base = base
        self.modes = list(modes)
        self.lock = threading.RLock()
        self._main = tree
        self._is_of_base = tree is None
        self._when_made: WeakMethod[Callable[[ModuleTree], None]] | None = None
        self._bound: NamedTensors = {}
        self._spare: list[PooledCopy] = []
        if tree is not None:
            self.buffers = tree.buffer_dicts()
        else:
            self.buffers = copy_buffers(base.tree.buffer_dicts()) if buffers is None else buffers

    # --- the main copy

    @property
    def tree(self) -> ModuleTree:
        """The main copy."""
        main = self._main
        return self._make() if main is None else main

    @property
    def module(self) -> nn.Module:
        """The root of the main copy."""
        return self.tree.module

    @property
    def is_made(self) -> bool:
        """Whether the main copy exists; if not, nobody can have changed anything in it."""
        return self._main is not None

    @property
    def outline(self) -> ModuleTree:
        """Which modules and parameters there are, only to be read: tensors and training modes may be others than the copy's."""
        return self.base.tree if self._main is None else self._main

    @constant_in_graphs
    def ready(self) -> bool:
        """Make the main copy now. Dynamo runs this as it is, since it cannot trace it."""
        return self.tree is not None

    def when_made(self, method: Callable[[ModuleTree], None]) -> None:
        """Call a method with the main copy before anything uses it; at once if it exists."""
        self._when_made = WeakMethod(method)  # its object has this pool; a cycle would delay the freeing of both
        if self._main is not None:
            method(self._main)

    def bind(self, tree: ModuleTree, tensors: NamedTensors) -> None:
        """Put tensors in the places of the main copy's parameters, where they stay between calls."""
        for name, tensor in tensors.items():
            tree.bind(name, tensor)
        self._bound = tensors
        self._spare = []

    def rebase(self, base: FrozenBase) -> None:
        """Replace the base by a moved or cast one."""
        with self.lock:
            if base is not self.base and self._main is not None:
                names = {id(tensor): name for name, tensor in self.base.tensors.items()}
                for name in self._main.places:
                    origin = names.get(id(self._main.tensor(name)))
                    if origin is not None:
                        self._main.bind(name, base.tensors[origin])
            self.base = base

    def fork(self, buffers: dict[str, ModuleBuffers] | None = None, *, of_base: bool = False) -> CopyPool:
        """Another pool of the same network, in the same modes.

        Args:
            buffers: its private buffers; None for copies of this one's.
            of_base: make the new main copy from the base where this one was made from it, whatever calls or users left in
                this one's attributes.
        """
        buffers = copy_buffers(self.buffers) if buffers is None else buffers
        if self._main is None or (of_base and self._is_of_base):
            return CopyPool(self.base, None, buffers, self.modes)
        return CopyPool(self.base, self._main.copy_with_buffers(buffers))

    def _make(self) -> ModuleTree:
        with self.lock, lasting_outside(), without_modes():
            if self._main is None:
                tree = self.base.tree.copy_with_buffers(self.buffers)
                for mode in self.modes:
                    tree.module.train(mode)
                method = None if self._when_made is None else self._when_made()
                if method is not None:
                    method(tree)
                self._main = tree  # last: other threads look for it without the lock
            return self._main

    # --- training modes

    @property
    def is_undecided(self) -> bool:
        """Whether only a copy could tell which modules are in training mode, since the network's own `train` decides."""
        return self._main is None and bool(self.modes) and not self.base.has_plain_modes

    @property
    def mode(self) -> bool:
        """The mode that the network was put in last; no copy is made for it."""
        return self.modes[-1] if self.modes and self._main is None else self.training

    @property
    def training(self) -> bool:
        """Whether the network is in training mode."""
        if torch.compiler.is_compiling():
            self.ready()  # first, since Dynamo assumes that what is read here does not change afterwards
        return self.trains("")

    def trains(self, module_name: str) -> bool:
        """Whether a module is in training mode."""
        if self.is_undecided:
            self.ready()
        if self._main is None and self.modes:
            return self.modes[-1]
        return self.outline.modules[module_name].training

    def train(self, mode: bool) -> None:
        """Set the training mode of the main copy, or of the one that will be made."""
        with self.lock:
            if self.base.has_plain_modes:
                self.modes = [mode]
            elif self._main is None:
                self.modes.append(mode)
            else:
                self._is_of_base = False  # the network's own `train` may have changed more than modes
            if self._main is not None:
                self._main.module.train(mode)

    def current_modes(self) -> Modes | bool:
        """Those of the base's modules that are in training mode here; while that is undecided, the mode that was set last."""
        if self.is_undecided:
            return self.modes[-1]
        return frozenset(name for name in self.base.tree.modules if name in self.outline.modules and self.trains(name))

    def set_modes(self, modes: Modes | bool) -> None:
        """Put the main copy's modules in these modes, unless they are in them."""
        with self.lock:
            if self.tree.modes() != modes:
                self.tree.set_modes(modes)

    # --- copies for one call

    @contextmanager
    def checkout(
        self, bindings: NamedTensors, buffers: NamedTensors, private_buffers: bool
    ) -> Iterator[tuple[PooledCopy, Call]]:
        """A copy with these tensors in the places of parameters, which no other call uses meanwhile.

        A later call reuses it unless this one changed its attributes, ran inside a checkpoint (which runs parts of the copy
        again in backward, and must find the same tensors there), or has a forward that is a generator and yet to run.

        Args:
            bindings: the tensors for the places of parameters, by parameter name.
            buffers: the tensors for the places of buffers, by global name.
            private_buffers: whether the other buffers are copies, or the main copy's own.
        """
        with calling() as call:
            copy = self._take()
            for source, target in copy.buffers:
                for attribute, buffer in source._buffers.items():
                    target._buffers[attribute] = buffer if buffer is None or not private_buffers else clone(buffer)
            for name, buffer in buffers.items():
                module_name, _, attribute = name.rpartition(".")
                copy.tree.modules[module_name]._buffers[attribute] = buffer
            for name, tensor in bindings.items():
                copy.tree.bind(name, tensor)
            yield copy, call
            if not (call.checkpointed or call.outlived) and copy.initial.is_unchanged():
                for name in bindings:
                    copy.tree.bind(name, self._bound[name] if name in self._bound else self.base.tensors[name])
                self._spare.append(copy)

    def run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bindings: NamedTensors,
        buffers: NamedTensors,
        private_buffers: bool,
    ) -> Any:
        """Call a method of the network on such a copy; for its forward that is `__call__`."""
        with self.checkout(bindings, buffers, private_buffers) as (copy, call):
            return call.returns(getattr(copy.tree.module, method)(*args, **kwargs))

    def _take(self) -> PooledCopy:
        while self._spare:
            try:
                copy = self._spare.pop()
            except IndexError:  # another thread took the last one
                break
            if copy.source.is_unchanged():
                return copy
        main = self.tree
        tree = main.copy()
        pairs = zip(main.modules.values(), tree.modules.values(), strict=True)
        buffers = [(ours, theirs) for ours, theirs in pairs if ours._buffers]
        return PooledCopy(tree, Snapshot(main.modules.values()), Snapshot(tree.modules.values()), buffers)
