"""A call that need not be followed, because one of its kind was: as long as it reads the same values of its tensors.

What a network does is settled by the form of its arguments and by the values that it reads (`if mask.all():`). Reading one
number is cheap to compare; what reads many, or makes a tensor of a size that values decide, is not tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .table import Function

Answer = bool | int | float
READERS: frozenset[Function] = frozenset(
    [
        Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.__contains__,
        Tensor.equal, torch.equal, Tensor.allclose, torch.allclose, Tensor.is_nonzero, torch.is_nonzero,
    ]
)  # fmt: skip
"""Functions that answer with one number of a tensor's values."""


class DivergedError(Exception):
    """The network went another way than the remembered one."""


class ReplayReads(TorchFunctionMode):
    """While it is on, numbers that are read of tensors must be those of an earlier call.

    Args:
        answers: the earlier call's, in order.

    Raises:
        DivergedError: out of the function that reads another number, or one more; at the end if some were not read.

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
        self, func: Function, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func in READERS:
            if self._count == len(self._answers) or self._answers[self._count] != result:
                raise DivergedError
            self._count += 1
        return result
