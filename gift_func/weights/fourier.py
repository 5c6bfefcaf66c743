"""`W + s·Re(F⁻¹(S))`: a change with a few frequencies."""

from __future__ import annotations

from math import log2, prod

import torch
from torch import Tensor

from .value import OnBase, Weight, add_scaled, as_weight, dense_linear


class Fourier(OnBase):
    """`W + s·Re(ifft2(S))`, where S is zero except for `spectrum` at `indices`.

    Args:
        base: W, a matrix or a stack of matrices, `(..., rows, columns)`.
        spectrum: `(..., n)`, real.
        indices: `(2, n)`, row and column of every entry in S.
        scale: s.
    """

    def __init__(self, base: Weight | Tensor, spectrum: Tensor, indices: Tensor, scale: float) -> None:
        self.base = as_weight(base)
        self.spectrum = spectrum
        self.indices = indices
        self.scale = scale

    def dense(self) -> Tensor:
        return add_scaled(self.base.dense(), self._change(), self.scale)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # A transform of n elements takes about 2.5·n·log2(n) products, a complex one twice that.
        rows, columns = self.shape[-2:]
        count = self.spectrum.shape[-1]
        forming = 2.5 * rows * columns * log2(max(rows * columns, 2))
        through = prod(x.shape[:-1]) * (5 * rows * log2(max(rows, 2)) + 5 * columns * log2(max(columns, 2)) + 8 * count)
        if torch.is_grad_enabled():
            through = 2 * through
        if self.ndim > 2 or through > forming:
            return dense_linear(x, self.dense(), bias)
        i, j = self.indices[0], self.indices[1]
        product = torch.fft.ifft(x.to(self._kind)).index_select(-1, j) * self.spectrum.to(self._kind)
        spread = torch.zeros(*x.shape[:-1], rows, dtype=product.dtype, device=x.device).index_add(-1, i, product)
        return add_scaled(self.base.linear(x, bias), torch.fft.ifft(spread).real, self.scale)

    @property
    def _kind(self) -> torch.dtype:
        # In half precision there are no transforms of some sizes.
        return torch.promote_types(self.spectrum.dtype, torch.float32)

    def _change(self) -> Tensor:
        rows, columns = self.shape[-2:]
        i, j = self.indices[0], self.indices[1]
        # The real part of the inverse is the inverse of the spectrum's even part, of which one half is enough.
        half = columns // 2 + 1
        values = self.spectrum.to(self._kind) / 2
        flat = torch.zeros(*values.shape[:-1], rows * half, dtype=values.dtype, device=values.device)
        for row, column in ((i, j), ((rows - i) % rows, (columns - j) % columns)):
            place = row * half + column.clamp(max=half - 1)
            flat = flat.scatter_add(-1, place.expand(values.shape), torch.where(column < half, values, 0.0))
        change: Tensor = torch.fft.irfft2(flat.unflatten(-1, (rows, half)), s=(rows, columns))
        return change
