"""Reads adapter files as adapters, without making models."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..adapt import draw_adapter, fill_adapter
from ..adapter import Adapter
from ..caching import LRU
from ..errors import AdaptError, FileError, StateError
from ..files import contents
from ..initialise import Shapes
from ..network.frozen_base import FrozenBase
from ..strategy import Strategy

STRATEGIES = 64
"""For how many strategies the shapes of tensors are cached."""

PAGE = 4096
"""How many bytes of a mapped file the system reads at once, at least."""


@dataclass(frozen=True)
class Read:
    """An adapter that was read.

    Attributes:
        adapter: the adapter; its tensors require no grad.
        trained: the names of the tensors that require grad in training.
    """

    adapter: Adapter
    trained: frozenset[str]

    @property
    def size(self) -> int:
        """The size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in (*self.adapter.tensors.values(), *self.adapter.buffers.values()))

    def copy(self) -> Adapter:
        """A copy of the adapter, which may be written to and trained."""
        return self.adapter.copy(self.trained)

    def touch(self) -> None:
        """Read one element of each page, so that the system reads the whole file."""
        for tensor in self.adapter.tensors.values():
            if tensor.device.type == "cpu":
                tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()


class Reader:
    """Reads adapter files for one base.

    The adapted parameters and the shapes of their tensors are found once for each strategy; the files of a folder mostly
    have the same one. The tensors of other files are then only checked.

    Args:
        base: the frozen base.
        check_base: refuse files that were made for another one.
        mapped: leave tensors in the pages of the mapped file; otherwise copy them.
    """

    def __init__(self, base: FrozenBase, *, check_base: bool, mapped: bool) -> None:
        self.base = base
        self.check_base = check_base
        self.mapped = mapped
        self._likes: LRU[Strategy, Adapter] = LRU(STRATEGIES)

    def read(self, path: str | os.PathLike[str]) -> Read:
        """The adapter in a file.

        Raises:
            FileError: if it is missing, damaged, made for another base, or its strategy or tensors do not fit the base.
        """
        try:
            tensors, strategy = contents(self.base, path, check_base=self.check_base)
            like = self._likes.get(strategy)
            if like is None:
                like = self._likes.put(strategy, draw_adapter(self.base, strategy, Shapes()))
            adapter = fill_adapter(like, tensors, owned=self.mapped)
        except (AdaptError, StateError) as error:
            raise FileError(f"{os.fspath(path)} does not fit this model: {error}") from None
        for tensor in adapter.tensors.values():
            tensor.requires_grad_(False)
        return Read(adapter, frozenset(name for name, tensor in like.tensors.items() if tensor.requires_grad))
