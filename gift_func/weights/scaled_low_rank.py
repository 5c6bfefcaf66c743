"""`W + s·diag(u)·L·diag(d)·R·diag(v)`: a low-rank change with trained scales around its factors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.choice import autocasts
from .low_rank import LowRank
from .value import Weight, add_scaled, dense_linear


class ScaledLowRank(LowRank):
    """`W + s·reshape(diag(rows)·outer·diag(middle)·inner·diag(columns))`.

    A linear layer scales the activations and not the factors, so that frozen factors need no gradient.

    Args:
        base, scale, dropout: as in `LowRank`.
        outer: `(..., out, r)`.
        middle: `(..., r)`.
        inner: `(..., r, in)`.
        rows: `(..., out)`, or None for ones.
        columns: `(..., in)`, or None for ones.
    """

    def __init__(
        self,
        base: Weight,
        outer: Tensor,
        middle: Tensor,
        inner: Tensor,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        scale: float | Tensor = 1.0,
        dropout: float = 0.0,
    ) -> None:
        self.base = base
        self.outer = outer
        self.middle = middle
        self.inner = inner
        self.rows = rows
        self.columns = columns
        self.scale = scale
        self.dropout = dropout

    # Properties, since a weight stays bound between calls while its tensors are trained.
    @property
    def left(self) -> Tensor:  # type: ignore[override]
        return self.outer if self.rows is None else self.rows.unsqueeze(-1) * self.outer

    @property
    def right(self) -> Tensor:  # type: ignore[override]
        right = self.middle.unsqueeze(-1) * self.inner
        return right if self.columns is None else right * self.columns.unsqueeze(-2)

    @property
    def _is_matrix(self) -> bool:
        return self.middle.ndim + 1 == self.base.ndim

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._is_matrix:
            return super().linear(x, bias)
        thin = F.dropout(x, self.dropout) if self.dropout else x
        if thin.dtype != self.middle.dtype and not autocasts(x):
            thin = thin.to(self.middle.dtype)
        stacked = self.middle.ndim > 1  # one scale for all tokens of a matrix
        middle, rows, columns = (
            t.unsqueeze(-2) if stacked and t is not None else t for t in (self.middle, self.rows, self.columns)
        )
        thin = thin if columns is None else thin * columns
        assert middle is not None
        change = dense_linear(dense_linear(thin, self.inner, None) * middle, self.outer, None)
        y = self.base.linear(x, bias)
        if rows is not None and y.dtype == change.dtype and not isinstance(self.scale, Tensor):
            return torch.addcmul(y, change, rows, value=self.scale)
        return add_scaled(y, change if rows is None else change * rows, self.scale)
