"""`m·V/‖V‖`: a frozen weight with a low-rank change, and trained norms of its rows or columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.gain import apply_gain
from .low_rank import LowRank
from .value import Convolution, Index, OnBase, Weight, add_scaled, dense_linear


class Magnitude(OnBase):
    """`m·V/‖V‖` for `V = W + s·B·A`, each norm taken over one dimension of a matrix, or over all but a kernel's first.

    Args:
        base: V.
        magnitude: m, as many elements as there are norms.
        squares: |W|², the sums of W's squares over that dimension; None for a kernel, whose V is computed whole.
        over: -1 for a norm of each row, -2 for one of each column.
        detach: whether ‖V‖ is a constant in backward.
    """

    base: LowRank

    def __init__(self, base: Weight, magnitude: Tensor, squares: Tensor | None, over: int, detach: bool) -> None:
        assert isinstance(base, LowRank)
        self.base = base
        self.magnitude = magnitude
        self.squares = squares
        self.over = over
        self.detach_norm = detach

    def norm(self) -> Tensor:
        """‖V‖, one for each row or column; computed without V itself where that is a matrix."""
        v = self.base
        if self.squares is None:
            kernel = v.eval().dense().flatten(1)
            kernel = kernel.detach() if self.detach_norm else kernel
            wide = torch.promote_types(kernel.dtype, torch.float32)
            lengths: Tensor = torch.linalg.vector_norm(kernel, dim=1, dtype=wide)
            return lengths
        weight, left, right = v.base, v.left, v.right
        if self.detach_norm:
            left, right = left.detach(), right.detach()
        if self.over == -2:
            weight, left, right = weight.mT, right.mT, left.mT
        across = weight.linear(right.to(weight.dtype)).mT  # W·Aᵀ, as the base's own class computes it
        left, right, across = (t.to(self.squares.dtype) for t in (left, right, across))
        # |W + s·B·A|² = |W|² + ⟨W·Aᵀ + D·(A·Aᵀ)/4, D⟩ in every row, with D = 2s·B.
        double = left * (2 * v.scale)
        total = self.squares + (add_scaled(across, double @ (right @ right.mT), 0.25) * double).sum(-1)
        # Where V is almost zero, its square is a difference as small as the rounding error: clamp it to that, and above 0.
        limits = torch.finfo(total.dtype)
        return torch.maximum(total, (self.squares * limits.eps).clamp_min(limits.tiny)).sqrt()

    def _gain(self) -> Tensor:
        """m / ‖V‖; where ‖V‖ is 0, m, which is multiplied by 0."""
        norm = self.norm().to(self.magnitude.dtype)
        return self.magnitude.reshape(norm.shape) / torch.where(norm > 0, norm, 1)

    def dense(self) -> Tensor:
        v = self.base.dense()
        gain = self._gain()
        return _scaled(v, gain.reshape(-1, *[1] * (v.ndim - 1)) if self.squares is None else gain.unsqueeze(self.over))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        v, w = self.base, self.base.base
        if self.squares is None:
            return super().linear(x, bias)
        gain = self._gain()
        gain = gain.unsqueeze(-2) if gain.ndim > 1 else gain  # to broadcast to activations `(..., tokens, features)`
        if v.dropout:
            thin = F.dropout(x, v.dropout)
            if self.over == -2:
                return w.linear(x, bias) + v.eval().linear(_scaled(thin, gain)) - w.linear(thin)
            plain = w.linear(thin)
            change = dense_linear(dense_linear(thin.to(v.right.dtype), v.right, None), v.left, None)
            return w.linear(x, bias) + _scaled(add_scaled(plain, change, v.scale), gain) - plain
        if self.over == -2:
            return v.linear(_scaled(x, gain), bias)
        return apply_gain(v.linear(x), gain, bias)

    def convolve(self, x: Tensor, conv: Convolution, bias: Tensor | None = None) -> Tensor:
        v, w = self.base, self.base.base
        if v.dropout:
            return w.convolve(x, conv, bias) + conv(F.dropout(x, v.dropout), self.eval().dense() - w.dense(), None)
        if v.as_two_convolutions(x, conv) is None:
            return super().convolve(x, conv, bias)
        gain = self._gain().reshape(-1, *[1] * (self.ndim - 2))
        return apply_gain(v.convolve(x, conv), gain, None if bias is None else bias.reshape(gain.shape))

    def lookup(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        if self.over == -1:
            return pick(self.eval().dense())  # dropout acts on input features, and indices have none
        rows = _scaled(self.base.lookup(pick, padding), self._gain())
        return rows if padding is None else torch.where(padding.unsqueeze(-1), rows.detach(), rows)

    @property
    def mT(self) -> Weight:
        if self.squares is None:
            return super().mT
        return self.replace(base=self.base.mT, over=-3 - self.over)

    def __getitem__(self, index: Index) -> Weight:
        if self.squares is None or (self.over == -2 and self.ndim == 2):  # a column's norm needs all rows
            return super().__getitem__(index)
        return self.replace(base=self.base[index], magnitude=self.magnitude[index], squares=self.squares[index])


def _scaled(x: Tensor, gain: Tensor) -> Tensor:
    return (x * gain).to(x.dtype)
