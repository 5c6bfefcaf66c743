"""`W + s·B·A`: a low-rank change, applied as two thin products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.choice import autocasts
from ..kernels.convolution import Conv, can_split, split_convolution, splitting_pays
from ..kernels.fused_linear import low_rank_linear
from .value import Convolution, Dense, Index, InputDropout, Weight, add_scaled, as_weight, dense_linear


class LowRank(InputDropout):
    """`W + s·reshape(left @ right)`, with dropout of the change's input.

    Args:
        base: W, of any shape.
        left: `(..., rows, r)`.
        right: `(..., r, columns)`; the product has as many elements as W and is read in W's shape,
            so one class serves matrices, stacks of matrices, and both ways to flatten a kernel.
        scale: s.
        dropout: probability of dropping an input feature of the change.
    """

    def __init__(
        self, base: Weight | Tensor, left: Tensor, right: Tensor, scale: float | Tensor = 1.0, dropout: float = 0.0
    ) -> None:
        self.base = as_weight(base)
        self.left = left
        self.right = right
        self.scale = scale
        self.dropout = dropout

    @property
    def _is_matrix(self) -> bool:
        """Whether the product of the factors has W's own shape, and not that of W flattened."""
        return self.left.shape[:-1] == self.base.shape[:-1]

    def change(self) -> Tensor:
        return (self.left @ self.right).reshape(self.base.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._is_matrix:
            return super().linear(x, bias)
        if isinstance(self.base, Dense) and not self.dropout:
            y = low_rank_linear(x, self.base.tensor, bias, self.left, self.right, self.scale)
            if y is not None:
                return y
        thin = F.dropout(x, self.dropout) if self.dropout else x
        if thin.dtype != self.right.dtype and not autocasts(x):
            thin = thin.to(self.right.dtype)
        change = dense_linear(dense_linear(thin, self.right, None), self.left, None)
        return add_scaled(self.base.linear(x, bias), change, self.scale)

    def convolve(self, x: Tensor, conv: Convolution, bias: Tensor | None = None) -> Tensor:
        two = self.as_two_convolutions(x, conv)
        if two is None and not self.dropout:
            return super().convolve(x, conv, bias)
        y = self.base.convolve(x, conv, bias)
        thin = F.dropout(x, self.dropout) if self.dropout else x
        if two is None:
            return add_scaled(y, conv(thin, self.change().to(x.dtype), None), self.scale)
        left, right = self.left, self.right
        if thin.dtype != right.dtype and not autocasts(x):
            thin = thin.to(right.dtype)
        return add_scaled(y, split_convolution(two, thin, self.shape, left * self.scale, right), 1.0)

    def as_two_convolutions(self, x: Tensor, conv: Convolution) -> Conv | None:
        """The convolution if the change is better applied as a thin one and a pointwise one than as a kernel, else None."""
        left, right = self.left, self.right
        if can_split(conv, x, self.shape, left, right) and (self.dropout or splitting_pays(self.shape, left, right)):
            return conv
        return None

    def lookup(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        if not self._is_matrix:
            return super().lookup(pick, padding)
        # Dropout acts on input features, and indices have none.
        change = pick(self.left) @ self.right
        if padding is not None:  # `pick` stops the gradient to the left factor, this the one to the right factor
            change = torch.where(padding.unsqueeze(-1), change.detach(), change)
        return add_scaled(self.base.lookup(pick, padding), change, self.scale)

    @property
    def mT(self) -> Weight:
        if not self._is_matrix:
            return super().mT
        return LowRank(self.base.mT, self.right.mT, self.left.mT, self.scale, self.dropout)

    def __getitem__(self, index: Index) -> Weight:
        if not self._is_matrix:
            return super().__getitem__(index)
        right = self.right if self.base.ndim == 2 else self.right[index]
        return LowRank(self.base[index], self.left[index], right, self.scale, self.dropout)
