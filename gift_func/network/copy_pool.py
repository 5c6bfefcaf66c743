"""The private copy of a frozen base's structure that a model runs, made when it is first needed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import nn

from .._torch import lasting_outside, without_modes
from .frozen_base import FrozenBase
from .module_tree import Buffers, ModuleTree, copied

Model = TypeVar("Model", bound=nn.Module)


class PrivateCopy(ABC):
    """A private copy of a network's structure, made at its first use unless one is given.

    Many an adapter is only loaded to be stacked, put into a bank or saved again, and a copy costs more than all the rest of
    it. The base's structure is private and never runs, so a copy made later is the same; threads that need it at once
    wait for one. Buffers are there from the start: they are part of a model's state.

    Args:
        base: the frozen base.
        structure: the copy; None for one of the base's that is made at first use.
        buffers: for a copy that is to be made, its private buffers; None for copies of the base's.

    Attributes:
        base: the frozen base.
        buffers: the private buffers, in the dictionaries in which the copy's modules hold them.
        pristine: whether the copy was made of the base, or will be, and no more than its mode was changed here.
        modes: the training modes that a copy of the base is to be put in, one after the other.
    """

    def __init__(self, base: FrozenBase, structure: ModuleTree | None, buffers: dict[str, Buffers] | None) -> None:
        self.base = base
        self.pristine = structure is None
        self.modes: list[bool] = []
        self._own: ModuleTree | None = None
        self._lock = threading.RLock()
        if structure is None:
            self.buffers = copied(base.structure.held()) if buffers is None else buffers
        else:
            self.buffers = structure.held()
            self.furnish(structure)
            self._own = structure

    @abstractmethod
    def furnish(self, structure: ModuleTree) -> None:
        """Put what belongs there into the copy, which is about to be used."""

    @property
    def structure(self) -> ModuleTree:
        """The private copy."""
        own = self._own
        return self._made() if own is None else own

    @property
    def module(self) -> nn.Module:
        """The root of the private copy."""
        return self.structure.module

    @property
    def is_made(self) -> bool:
        """Whether the private copy is there; if not, nobody can have changed anything in it."""
        return self._own is not None

    @property
    def outline(self) -> ModuleTree:
        """Which modules and parameters there are, only to be read: tensors and training modes may be others than the copy's."""
        return self.base.structure if self._own is None else self._own

    @property
    def is_undecided(self) -> bool:
        """Whether it takes making the copy to know which modules are in training mode, since some set theirs themselves."""
        return self._own is None and bool(self.modes) and not self.base.has_plain_modes

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

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def ready(self) -> bool:
        """Make the private copy now. Dynamo runs this where it could not trace the making."""
        return self.structure is not None

    def train(self, mode: bool) -> None:
        """Set the training mode of the copy, or of the one that will be made."""
        with self._lock:
            if self.base.has_plain_modes:
                self.modes = [mode]
            elif self._own is None:
                self.modes.append(mode)
            else:
                self.pristine = False  # what else that does, only this copy knows
            if self._own is not None:
                self._own.module.train(mode)

    def in_mode(self, model: Model) -> Model:
        """A model made of the same base, put in the mode of this copy where that is no more than the base's and a mode."""
        for mode in self.modes if self.pristine else ():
            model.train(mode)
        return model

    def rebase(self, base: FrozenBase) -> None:
        """Exchange the base for a moved or cast one."""
        with self._lock:
            if base is not self.base and self._own is not None:
                names = {id(tensor): name for name, tensor in self.base.tensors.items()}
                for name in self._own.places:
                    origin = names.get(id(self._own.tensor(name)))
                    if origin is not None:
                        self._own.bind(name, base.tensors[origin])
            self.base = base

    def _made(self) -> ModuleTree:
        with self._lock, lasting_outside(), without_modes():
            if self._own is None:
                structure = self.base.structure.holding(self.buffers)
                for mode in self.modes:
                    structure.module.train(mode)
                self.furnish(structure)
                self._own = structure  # last: other threads look for it without the lock
            return self._own
