"""A call that is not tracked, because an earlier call of its kind was: valid while it reads the same values from its tensors.

What a network does depends on the form of its arguments and on the values that it reads (`if mask.all():`). Single numbers
are cheap to compare. A call that reads many, or makes a tensor whose size depends on values, is tracked every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..weights.slot import TorchFunction

Answer = bool | int | float
READERS: frozenset[TorchFunction] = frozenset(
    [
        Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.__contains__,
        Tensor.equal, torch.equal, Tensor.allclose, torch.allclose, Tensor.is_nonzero, torch.is_nonzero,
    ]
)  # fmt: skip
"""Functions that return one number, read from a tensor's values."""


class DivergedError(Exception):
    """A call did not do what the recorded path says."""


class ReplayReads(TorchFunctionMode):
    """A mode in which the numbers that are read from tensors must be those of an earlier call.

    Args:
        answers: the numbers that the earlier call read, in order.

    Raises:
        DivergedError: from the function that reads another number, or one too many; on leaving the mode if some were not read.

    Example:
        >>> import torch
        >>> from gift_func.tracking.replay import ReplayReads
        >>> with ReplayReads([True]) as mode:
        ...     bool(torch.ones(2).all())
        True
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__()
        self._answers = answers
        self._count = 0

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None) -> None:
        super().__exit__(kind, value, where)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if kind is None and self._count < len(self._answers):
            raise DivergedError

    def __torch_function__(
        self, func: TorchFunction, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func in READERS:
            if self._count == len(self._answers) or self._answers[self._count] != result:
                raise DivergedError
            self._count += 1
        return result
