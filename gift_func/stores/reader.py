"""Adapter files read as entries: tensors and what they are for, at little more than the cost of reading them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapt import readapt
from ..adapter import AdaptedParameters, Adapter
from ..caching import LRU
from ..errors import AdaptError, FileError, StateError
from ..files import contents
from ..network.frozen_base import FrozenBase
from ..network.module_tree import clone
from ..strategy import Strategy

PLANS = 64
"""How many strategies are remembered."""

PAGE = 4096
"""Bytes that the system reads at once from a mapped file, or more."""


@dataclass(frozen=True)
class Read:
    """An adapter that was read.

    Attributes:
        adapter: its tensors, which require no grad, and what they are for.
        trained: the names of the tensors that require grad where they are trained.
    """

    adapter: Adapter
    trained: frozenset[str]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.adapter.tensors.values(), *self.adapter.buffers.values()))

    def copy(self) -> Adapter:
        """An adapter with tensors of its own, which may be written to and trained."""
        tensors = {
            name: nn.Parameter(clone(tensor), requires_grad=name in self.trained)
            for name, tensor in self.adapter.tensors.items()
        }
        made = self.adapter.replace_tensors(tensors)
        made.buffers = {name: clone(buffer) for name, buffer in made.buffers.items()}
        return made

    def touch(self) -> None:
        """Have the system read what is mapped."""
        for tensor in self.adapter.tensors.values():
            if tensor.device.type == "cpu":
                tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()


@dataclass(frozen=True)
class _Plan:
    """What a strategy makes of the base."""

    parameters: AdaptedParameters
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

    def __init__(self, base: FrozenBase, *, check_base: bool, mapped: bool) -> None:
        self.base = base
        self.check_base = check_base
        self.mapped = mapped
        self._plans: LRU[Strategy, _Plan | Literal[False]] = LRU(PLANS)

    def read(self, path: str | os.PathLike[str]) -> Read:
        """The adapter in a file.

        Raises:
            FileError: if it is missing, damaged, made for another base, or its strategy or tensors do not fit the base.
        """
        try:
            tensors, strategy = contents(self.base, path, check_base=self.check_base)
            plan = self._plans.get(strategy)
            if plan is None:
                plan = self._plans.put(strategy, self._planned(strategy, tensors))
            if not plan or not plan.fits(tensors):
                return self._in_full(strategy, tensors)
        except (AdaptError, StateError) as error:
            raise FileError(f"{os.fspath(path)} does not fit this model: {error}") from None
        made = {}
        for name, (_, device, dtype) in plan.like.items():
            found = tensors[name].to(device, dtype, copy=not self.mapped)
            made[name] = nn.Parameter(found, requires_grad=False)
        return Read(Adapter(plan.parameters, strategy, made), plan.trained)

    def _planned(self, strategy: Strategy, tensors: Mapping[str, Tensor]) -> _Plan | Literal[False]:
        """What a strategy makes of the base; False if that includes modules, which each adapter has for itself."""
        model = readapt(self.base, strategy, tensors)
        if model.to_adapter().tree is not None:
            return False
        like = {name: (tensor.shape, tensor.device, tensor.dtype) for name, tensor in model.adapter.items()}
        trained = frozenset(name for name, _ in model.named_trainable_parameters())
        return _Plan(model.adapted_parameters, like, trained)

    def _in_full(self, strategy: Strategy, tensors: Mapping[str, Tensor]) -> Read:
        model = readapt(self.base, strategy, tensors)
        trained = frozenset(name for name, _ in model.named_trainable_parameters())
        return Read(model.requires_grad_(False).to_adapter(), trained)
