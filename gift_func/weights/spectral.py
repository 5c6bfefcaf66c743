"""`U·diag(relu(σ + δ))·Vᵀ`: a weight as its singular value decomposition, with shifted singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from .value import Weight, dense_linear


class Spectral(Weight):
    """`reshape(U·diag(relu(σ + δ))·Vᵀ, shape)`.

    Args:
        u: `(rows, k)`, orthonormal columns.
        sigma: `(k,)`, the frozen singular values.
        vh: `(k, columns)`, orthonormal rows.
        shift: δ, `(k,)`, the trained shift.
        shape: shape of the weight; rows·columns elements.
    """

    def __init__(self, u: Tensor, sigma: Tensor, vh: Tensor, shift: Tensor, shape: torch.Size) -> None:
        self.u = u
        self.sigma = sigma
        self.vh = vh
        self.shift = shift
        self.size = shape

    @property
    def shape(self) -> torch.Size:
        return self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def _spectrum(self) -> Tensor:
        return torch.relu(self.sigma + self.shift).to(self.u.dtype)

    def dense(self) -> Tensor:
        return ((self.u * self._spectrum) @ self.vh).reshape(self.size)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, rank = self.u.shape
        columns = self.vh.shape[-1]
        tokens = x.shape.numel() // x.shape[-1] if x.shape[-1] else 0
        # By the factors: tokens·k·(rows + columns) products. By the matrix: k·rows·columns to compute it and
        # tokens·rows·columns to apply it. For few tokens the factors are cheaper.
        if tokens * rank * (rows + columns) > (rank + tokens) * rows * columns or self.size != (rows, columns):
            return super().linear(x, bias)
        return dense_linear(dense_linear(x, self.vh, None) * self._spectrum, self.u, bias)
