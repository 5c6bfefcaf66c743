"""`W + s·C`: a change whose blocks are circulant, one row each."""

from __future__ import annotations

from math import log2, prod

import torch
from torch import Tensor

from .value import OnBase, Weight, add_scaled, as_weight, dense_linear


class Circulant(OnBase):
    """`W + s·C`, where block (i, j) of C has row k equal to `kernel[i, j]` shifted right by k places.

    Args:
        base: W, a matrix or a stack of matrices, `(..., m·b, n·b)`.
        kernel: `(..., m, n, b)`, the first row of every block.
        scale: s.
    """

    def __init__(self, base: Weight | Tensor, kernel: Tensor, scale: float) -> None:
        self.base = as_weight(base)
        self.kernel = kernel
        self.scale = scale

    def dense(self) -> Tensor:
        size = self.kernel.shape[-1]
        # Windows of the row written twice, from the last back to the second, are the row shifted by 0, 1, ...
        shifted = torch.cat([self.kernel, self.kernel], dim=-1).unfold(-1, size, 1)[..., 1:, :].flip(-2)
        change = shifted.transpose(-2, -3).flatten(-2).flatten(-3, -2)
        return add_scaled(self.base.dense(), change, self.scale)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, columns = self.shape[-2:]
        size, tokens = self.kernel.shape[-1], prod(x.shape[:-1])
        # Counts of products; those of transforms and small complex matrices weighted by their cost beside a large matrix's.
        through = tokens * (2.5 * log2(max(size, 2)) * (rows + columns) + 12.0 * rows * columns / size)
        forming = 3.0 * rows * columns
        if torch.is_grad_enabled():
            through, forming = 3 * through, 2 * forming + 0.4 * tokens * rows * columns
        if self.ndim > 2 or through > forming:
            return dense_linear(x, self.dense(), bias)
        # In half precision there are no transforms of some sizes.
        kind = torch.promote_types(self.kernel.dtype, torch.float32)
        waves = torch.fft.rfft(x.to(kind).unflatten(-1, (columns // size, size)))
        product = torch.einsum("...nf,mnf->...mf", waves, torch.fft.rfft(self.kernel.to(kind)).conj())
        return add_scaled(self.base.linear(x, bias), torch.fft.irfft(product, n=size).flatten(-2), self.scale)
