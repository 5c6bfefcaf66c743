"""Layouts: how two factors `B (out, r)` and `A (r, in)`, and their product, fit a parameter."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

ConvLayout = Literal["kernel", "balanced"]
Layout = Literal["matrix", "transposed", "stacked", "kernel", "balanced"]


def matrix_of(shape: torch.Size, layout: Layout) -> tuple[list[int], int, int]:
    """Leading dimensions, rows (outputs) and columns (inputs) of a parameter seen in a layout."""
    if layout == "kernel":
        return [], shape[0], prod(shape[1:])
    if layout == "balanced":
        return [], *balanced(shape)
    *lead, rows, columns = shape
    return (lead, columns, rows) if layout == "transposed" else (lead, rows, columns)


def balanced(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a kernel's memory as a matrix that is about square."""
    if len(shape) <= 3:
        return shape[0], prod(shape[1:])
    return shape[0] * shape[2], shape[1] * prod(shape[3:])


def as_matrix(parameter: Tensor, layout: Layout) -> Tensor:
    """A parameter as the matrix, outputs by inputs, or the stack of matrices that a layout means."""
    lead, rows, columns = matrix_of(parameter.shape, layout)
    return parameter.mT if layout == "transposed" else parameter.reshape(*lead, rows, columns)


def as_stored(b: Tensor, a: Tensor, shape: torch.Size, layout: Layout) -> tuple[Tensor, Tensor]:
    """The factors as an adapter stores them: a kernel's as the kernels of two convolutions, as in PEFT's files."""
    if layout != "kernel":
        return b, a
    return b.reshape(*b.shape, *[1] * (len(shape) - 2)), a.reshape(a.shape[0], *shape[1:])


def factors_of(b: Tensor, a: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Left and right factor of the weight as it is stored, from the factors as an adapter stores them."""
    if layout == "transposed":
        return a.mT, b.mT
    if layout == "kernel":
        groups = a.shape[0] // b.shape[1]
        a, b = a.flatten(1), b.flatten(1)
        if groups > 1:  # PEFT's grouped convolutions: every group has its own share of the rank
            return rearrange(b, "(g o) r -> g o r", g=groups), rearrange(a, "(g r) c -> g r c", g=groups)
    return b, a


def rank_axes(factor: Tensor, *, left: bool, kernel: bool = False) -> tuple[int, ...]:
    """The axis of the rank in a factor of a product.

    Args:
        factor: the factor.
        left: whether it is the left one.
        kernel: whether the factors are kernels and not matrices.
    """
    return (int(left),) if kernel else (factor.ndim - (1 if left else 2),)
