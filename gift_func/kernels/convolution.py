"""`conv(x, s·B·A)`, as one kernel or as two convolutions: into r channels by A, then point by point by B.

The kernel is small and cheap to form, but its gradient costs as much as the layer's forward. The two convolutions cost
more passes over the activations. So narrow layers form the kernel and wide ones do not.
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
"""Products that the two convolutions' passes cost for each channel (measured: 64 channels of 3×3 lose, 128 break even)."""


@dataclass(frozen=True)
class Conv:
    """A convolution function with its stride, padding and the rest; called with input, kernel and bias.

    Attributes:
        function: `torch.conv2d` or another of its kind.
        args: what follows the bias.
        kwargs: the same by name.
        transposed: whether it is a transposed convolution.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    transposed: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, *self.args, **self.kwargs)


def splits(conv: object, x: Tensor, shape: torch.Size, left: Tensor, right: Tensor) -> TypeGuard[Conv]:
    """Whether the change is a convolution into r channels and another point by point: no groups, not transposed.

    Args:
        conv: what is to be done with the kernel.
        x: the input.
        shape: of the kernel, `(out, in/groups, ...)`.
        left: B, `(out, r)`.
        right: A, `(r, in/groups·...)`.
    """
    flat = (shape[0], prod(shape[1:])) == (left.shape[0], right.shape[-1]) and left.ndim == right.ndim == 2
    return isinstance(conv, Conv) and not conv.transposed and flat and x.shape[1 - len(shape)] == shape[1]


def splitting_pays(shape: torch.Size, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel's gradient, which is wanted, costs more than two convolutions and their gradients."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and not any(t.requires_grad or is_transformed(t) for t in (left, right)):
        return False
    (rows, rank), columns = left.shape, right.shape[1]
    return rows * columns > 2 * rank * (rows + columns) + PASSES * (rows + shape[1])


def split(conv: Conv, x: Tensor, shape: torch.Size, left: Tensor, right: Tensor) -> Tensor:
    """`conv(x, B·A)` as two convolutions; arguments as for `splits`."""
    thin = conv(x, right.unflatten(1, shape[1:]), None)
    return conv.function(thin, left.reshape(*left.shape, *[1] * (len(shape) - 2)))
