"""Adapter files read as entries: tensors and what they are for, at little more than the cost of reading them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapt import readapt
from ..banks.entry import Adapter
from ..errors import AdaptError, FileError, StateError
from ..files import contents
from ..network.frozen_base import FrozenBase
from ..network.module_tree import clone
from ..network.runner import AdaptedParameter
from ..strategy import Strategy

PAGE = 4096
"""Bytes that the system reads at once from a mapped file, or more."""


@dataclass(frozen=True)
class Read:
    """An adapter that was read.

    Attributes:
        entry: its tensors, which require no grad, and what they are for.
        trained: the names of the tensors that require grad where they are trained.
    """

    entry: Adapter
    trained: frozenset[str]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.entry.tensors.values(), *self.entry.buffers.values()))

    def copy(self) -> Adapter:
        """An entry with tensors of its own, which may be written to and trained."""
        tensors = {
            name: nn.Parameter(clone(tensor), requires_grad=name in self.trained) for name, tensor in self.entry.tensors.items()
        }
        made = self.entry.on(self.entry.base, tensors)
        made.buffers = {name: clone(buffer) for name, buffer in made.buffers.items()}
        return made

    def touch(self) -> None:
        """Have the system read what is mapped."""
        for tensor in self.entry.tensors.values():
            if tensor.device.type == "cpu":
                tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()


@dataclass(frozen=True)
class _Plan:
    """What a strategy makes of the base."""

    parts: tuple[AdaptedParameter, ...]
    like: dict[str, tuple[torch.Size, torch.device, torch.dtype]]
    trained: frozenset[str]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        return tensors.keys() == self.like.keys() and all(t.shape == self.like[name][0] for name, t in tensors.items())


class Reader:
    """Reads adapter files onto one base.

    What a strategy makes of the base (which parameters, by which tensors of which shapes) is looked up once for each
    strategy, of which the files of a folder mostly have one. Another file of it is then its tensors and a check of them.

    Args:
        base: the frozen base.
        check_base: refuse files that were made for another one.
        mapped: leave tensors in the file's pages, rather than copy them.
    """

    PLANS = 64

    def __init__(self, base: FrozenBase, *, check_base: bool, mapped: bool) -> None:
        self.base = base
        self.check_base = check_base
        self.mapped = mapped
        self._plans: OrderedDict[Strategy, _Plan | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str | os.PathLike[str]) -> Read:
        """The adapter in a file.

        Raises:
            FileError: if it is missing, damaged, made for another base, or its strategy or tensors do not fit the base.
        """
        try:
            tensors, strategy = contents(self.base, path, check_base=self.check_base)
            with self._lock:
                known = strategy in self._plans
                plan = self._plans.get(strategy)
            if not known:
                plan = self._planned(strategy, tensors)
            if plan is None or not plan.fits(tensors):
                return self._in_full(strategy, tensors)
        except (AdaptError, StateError) as error:
            raise FileError(f"{os.fspath(path)} does not fit this model: {error}") from None
        made = {}
        for name, (_, device, dtype) in plan.like.items():
            found = tensors[name].to(device, dtype, copy=not self.mapped)
            made[name] = nn.Parameter(found, requires_grad=False)
        return Read(Adapter(self.base, plan.parts, strategy, made, {}, None), plan.trained)

    def _planned(self, strategy: Strategy, tensors: Mapping[str, Tensor]) -> _Plan | None:
        """What a strategy makes of the base; None if that includes modules, which each adapter has for itself."""
        model = readapt(self.base, strategy, tensors)
        plan = None
        if Adapter.of(model).structure is None:
            like = {name: (tensor.shape, tensor.device, tensor.dtype) for name, tensor in model.adapter.items()}
            trained = frozenset(name for name, _ in model.named_trainable_parameters())
            plan = _Plan(model.parts, like, trained)
        with self._lock:
            self._plans[strategy] = plan
            while len(self._plans) > self.PLANS:
                self._plans.popitem(last=False)
        return plan

    def _in_full(self, strategy: Strategy, tensors: Mapping[str, Tensor]) -> Read:
        model = readapt(self.base, strategy, tensors)
        trained = frozenset(name for name, _ in model.named_trainable_parameters())
        return Read(Adapter.of(model.requires_grad_(False)), trained)
