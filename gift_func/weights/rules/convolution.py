"""Convolutions of any dimension, transposed ones included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.convolution import Conv
from ..slot import Slot, dense_of, rule


def _convolution(function: Callable[..., Tensor], transposed: bool) -> None:
    @rule(function)
    def convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, Slot):
            return NotImplemented
        return weight.weight.convolve(dense_of(input), Conv(function, args, kwargs, transposed), dense_of(bias))


for _dims in (1, 2, 3):
    _convolution(getattr(torch, f"conv{_dims}d"), transposed=False)
    _convolution(getattr(torch, f"conv_transpose{_dims}d"), transposed=True)
