"""What a bank keeps of its adapters, and how it moves them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from ..adapted_model import AdaptedModel
from .entry import Adapter


class Kept:
    """The models of the adapters asked for last; safe under threads."""

    SIZE = 32

    def __init__(self) -> None:
        self._found: OrderedDict[Adapter, AdaptedModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, entry: Adapter) -> AdaptedModel | None:
        """The model of an adapter, if it is kept."""
        with self._lock:
            found = self._found.get(entry)
            if found is not None:
                self._found.move_to_end(entry)
            return found

    def put(self, entry: Adapter, model: AdaptedModel) -> AdaptedModel:
        """Keep the model of an adapter, unless another thread was first; the one that is kept."""
        with self._lock:
            kept = self._found.setdefault(entry, model)
            while len(self._found) > self.SIZE:
                self._found.popitem(last=False)
            return kept


class Conversion(nn.Module):
    """What `nn.Module.to` does to each tensor."""

    function: Callable[[Tensor], Tensor]

    @staticmethod
    def of(*args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
        """For arguments as `nn.Module.to` takes them."""
        return Conversion().to(*args, **kwargs).function

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.function = fn
        return self
