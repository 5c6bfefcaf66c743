"""Weights that differ from their base in some entries only, or in some rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.choice import autocasts
from .value import OnBase, Weight, as_weight, dense_linear, without_padding


class SparseDelta(OnBase):
    """`W + s·scatter(v)`: values added at some entries of W.

    Args:
        base: W, of any shape `(d_0, d_1, ...)`, seen as the matrix `(d_0, d_1·d_2·...)`.
        values: v, `(n,)`.
        indices: `(2, n)`, the row and column of each value in that matrix, no pair twice.
        scale: s.
    """

    def __init__(self, base: Weight | Tensor, values: Tensor, indices: Tensor, scale: float | Tensor = 1.0) -> None:
        self.base = as_weight(base)
        self.values = values
        self.indices = indices
        self.scale = scale

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.base.dtype, self.values.dtype)
        flat = self.base.dense().to(wide).flatten()
        rows, columns = self.indices.long().unbind(-2)
        place = rows * (flat.shape[0] // self.shape[0]) + columns
        return flat.index_add(0, place, self.values.to(wide) * self.scale).to(self.base.dtype).view(self.shape)


class ReplacedRows(OnBase):
    """W with some of its rows replaced.

    Args:
        base: W, `(rows, columns)`.
        replacement: `(n, columns)`, the new rows.
        indices: `(n,)`, which rows they replace, none twice.
        positions: `(rows, 1)`, for every row of W the index of its replacement, or -1.
    """

    def __init__(self, base: Weight | Tensor, replacement: Tensor, indices: Tensor, positions: Tensor) -> None:
        self.base = as_weight(base)
        self.replacement = replacement
        self.indices = indices
        self.positions = positions

    def dense(self) -> Tensor:
        return self.base.dense().index_copy(0, self.indices, self.replacement.to(self.base.dtype))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.base.linear(x, bias)
        thin = x if autocasts(x) else x.to(self.replacement.dtype)
        part = None if bias is None else bias.index_select(0, self.indices).to(thin.dtype)
        return y.index_copy(-1, self.indices, dense_linear(thin, self.replacement, part).to(y.dtype))

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        position = pick(self.positions).squeeze(-1)
        chosen = without_padding(self.replacement[position.clamp(min=0)].to(self.base.dtype), padding)
        return torch.where((position >= 0).unsqueeze(-1), chosen, self.base.choose(pick, padding))
