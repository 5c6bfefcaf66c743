"""SVDiff: a weight's singular values are shifted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..select import Site
from ..weights import Spectral, Weight
from .matrix import TWO_FACTORS, MatrixMethod, matrix_shape


@dataclass(frozen=True)
class SVDiff(MatrixMethod):
    """`W' = U·diag(relu(σ + δ))·Vᵀ` with `W = U·diag(σ)·Vᵀ`: only the shift δ of the spectrum is trained.

    The singular vectors stay, so the change is compact and hard to overfit. δ starts at zero. The decomposition is
    computed once for each weight and kept with the base; it is not saved.

    Shapes: spectral_shift `(min(rows, columns),)`; a matrix is taken as it is, a kernel as `conv` says.

    Args:
        conv: how a weight of more than two dimensions is seen as a matrix. `"balanced"`: as in `LoRA`;
            `"rows"`: one row for each output channel.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), gf.SVDiff())
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'spectral_shift': (2,)}

    References:
        Han et al., SVDiff, 2023 (arXiv:2303.11305).
    """

    needs = TWO_FACTORS

    conv: Literal["balanced", "rows"] = "balanced"

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rank = min(self._matrix(site.parameter.shape))
        return {"spectral_shift": torch.zeros(rank, dtype=site.parameter.dtype, device=site.parameter.device)}

    def precompute(self, base: Weight) -> dict[str, Tensor]:
        matrix = base.dense().reshape(self._matrix(base.shape))
        # Half precision has no decomposition; the factors are rounded back, as the weight itself is.
        wide = matrix.dtype if matrix.dtype in (torch.float32, torch.float64) else torch.float32
        u, sigma, vh = torch.linalg.svd(matrix.to(wide), full_matrices=False)
        return {"u": u.to(base.dtype), "sigma": sigma.to(base.dtype), "vh": vh.to(base.dtype)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return Spectral(tensors["u"], tensors["sigma"], tensors["vh"], tensors["spectral_shift"], base.shape)

    def _matrix(self, shape: torch.Size) -> torch.Size:
        return matrix_shape(shape, "balanced" if self.conv == "balanced" else "kernel")
