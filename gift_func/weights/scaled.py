"""`W ⊙ factor`: rows or columns of a weight scaled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.gain import apply_gain
from .value import Index, OnBase, Side, Weight, as_weight, without_padding


class Scaled(OnBase):
    """`W ⊙ factor`, where the factor is constant along all but one dimension.

    Args:
        base: W, of any shape.
        factor: of a shape that broadcasts to that of W.
        side: whether it scales rows (`"output"`) or columns of a matrix.
        source: the tensor that the factor is a view of; by default the factor itself.
    """

    def __init__(self, base: Weight | Tensor, factor: Tensor, side: Side, source: Tensor | None = None) -> None:
        self.base = as_weight(base)
        self.factor = factor
        self.side = side
        self.source = factor if source is None else source

    def dense(self) -> Tensor:
        return (self.base.dense() * self.factor).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # Scaling activations costs a product for each token; scaling the weight needs its full gradient in backward.
        width = self.shape[-1] if self.side == "output" else self.shape[-2]
        if not torch.is_grad_enabled() and x.shape[:-1].numel() > width:
            return super().linear(x, bias)
        factor = self.factor.mT if self.side == "output" else self.factor
        factor = factor.squeeze(-2) if factor.ndim == 2 else factor
        if self.side == "input":
            return self.base.linear((x * factor).to(x.dtype), bias)
        return apply_gain(self.base.linear(x), factor, bias)

    def affine(self, x: Tensor, bias: Weight) -> Tensor:
        """`linear` with a bias that is a weight too; if one tensor scales both, the sum is scaled once."""
        if self.side == "input" or not isinstance(bias, Scaled) or bias.source is not self.source or self.ndim != 2:
            return self.linear(x, bias.dense())
        if not torch.is_grad_enabled() and x.shape[:-1].numel() > self.shape[-1]:
            return self.linear(x, bias.dense())
        return apply_gain(self.base.linear(x, bias.base.dense()), self.factor.reshape(self.shape[0]), None)

    def lookup(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        if self.side == "output" or self.ndim != 2:
            return super().lookup(pick, padding)
        rows = self.base.lookup(pick, padding)
        return without_padding((rows * self.factor.squeeze(-2)).to(rows.dtype), padding)

    @property
    def mT(self) -> Weight:
        return Scaled(self.base.mT, self.factor.mT, "input" if self.side == "output" else "output")

    def __getitem__(self, index: Index) -> Weight:
        factor = self.factor if self.factor.shape[0] == 1 else self.factor[index]
        return Scaled(self.base[index], factor, self.side)
