"""Linear layers and matrix products, with the weight on either side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..scaled import Scaled
from ..slot import Slot, dense_of, rule
from ..value import Weight


@rule(F.linear, torch._C._nn.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Slot):
        return NotImplemented
    if isinstance(bias, Slot) and isinstance(weight.weight, Scaled):
        return weight.weight.affine(dense_of(input), bias.weight)
    return weight.weight.linear(dense_of(input), dense_of(bias))


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Any:
    if out is not None:
        return NotImplemented
    if isinstance(other, Slot) and other.ndim >= 2:
        return _act(other.weight.mT, dense_of(input))
    if isinstance(input, Slot) and input.ndim >= 2:
        # W @ y is the transpose of yᵀ @ Wᵀ.
        other = dense_of(other)
        return _act(input.weight, other) if other.ndim == 1 else input.weight.linear(other.mT).mT
    return NotImplemented


@rule(Tensor.__rmatmul__)
def rmatmul(self: Tensor, other: Tensor) -> Any:
    return matmul(other, self)


@rule(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Any:
    slot = mat2 if isinstance(mat2, Slot) else mat1
    if not isinstance(slot, Slot) or out is not None:
        return NotImplemented
    input = dense_of(input)
    if slot is mat2 and input.ndim == 1 and slot.ndim == 2 and beta == 1 and alpha == 1:
        return slot.weight.mT.linear(dense_of(mat1), input)
    product = matmul(mat1, mat2)
    # Not by `alpha`, which inductor (torch 2.13) loses where it folds the sum into a product with its bias.
    return (input if beta == 1 else input * beta) + (product if alpha == 1 else product * alpha)


def _act(weight: Weight, x: Tensor) -> Tensor:
    """`x @ W.mT`; a vector is multiplied by every matrix of a stack."""
    if x.ndim == 1 and weight.ndim > 2:
        return weight.linear(x.unsqueeze(0)).squeeze(-2)
    return weight.linear(x)
