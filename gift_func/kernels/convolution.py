"""`conv(x, s·B·A)`, as one kernel or as two convolutions: one into r channels by A, then a pointwise one by B.

The kernel is small and cheap to compute, but its gradient costs as much as the layer's forward. The two convolutions take
more passes over the activations. So narrow layers compute the kernel and wide ones do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .._torch import is_transformed

PASSES = 256
"""Cost of the two convolutions' passes in products for each channel (measured: slower at 64 channels of 3×3, even at 128)."""


@dataclass(frozen=True)
class Conv:
    """A convolution function with the arguments after the bias: its stride, padding and so on."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    transposed: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, *self.args, **self.kwargs)


def can_split(conv: object, x: Tensor, shape: torch.Size, left: Tensor, right: Tensor) -> TypeGuard[Conv]:
    """Whether the change can be two convolutions, the second pointwise: without groups, and not transposed.

    The kernel has the shape `(out, in/groups, ...)`, `left` is B `(out, r)`, and `right` is A `(r, in/groups·...)`.
    """
    flat = (shape[0], prod(shape[1:])) == (left.shape[0], right.shape[-1]) and left.ndim == right.ndim == 2
    return isinstance(conv, Conv) and not conv.transposed and flat and x.shape[1 - len(shape)] == shape[1]


def splitting_pays(shape: torch.Size, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel's gradient is needed and costs more than two convolutions and their gradients."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and not any(t.requires_grad or is_transformed(t) for t in (left, right)):
        return False
    (rows, rank), columns = left.shape, right.shape[1]
    return rows * columns > 2 * rank * (rows + columns) + PASSES * (rows + shape[1])


def split_convolution(conv: Conv, x: Tensor, shape: torch.Size, left: Tensor, right: Tensor) -> Tensor:
    """`conv(x, B·A)` as two convolutions; arguments as of `can_split`."""
    thin = conv(x, right.unflatten(1, shape[1:]), None)
    return conv.function(thin, left.reshape(*left.shape, *[1] * (len(shape) - 2)))
