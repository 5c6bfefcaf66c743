"""Layouts: how two factors `B (out, r)` and `A (r, in)`, and their product, fit a parameter."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from .matrix import View

ConvLayout = Literal["kernel", "balanced"]


def as_stored(b: Tensor, a: Tensor, shape: torch.Size, layout: View) -> tuple[Tensor, Tensor]:
    """The factors as an adapter stores them: a kernel's as the kernels of two convolutions, as in PEFT's files."""
    if layout != "kernel":
        return b, a
    return b.reshape(*b.shape, *[1] * (len(shape) - 2)), a.reshape(a.shape[0], *shape[1:])


def factors_of(b: Tensor, a: Tensor, layout: View) -> tuple[Tensor, Tensor]:
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
    """The axis of the rank in the left or right factor of a product, a matrix or a kernel."""
    return (int(left),) if kernel else (factor.ndim - (1 if left else 2),)
