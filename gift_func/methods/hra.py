"""HRA: features are transformed by a few Householder reflections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import sqrt

import torch
from torch import Tensor

from ..select import Site
from ..weights import HouseholderRotation, Weight
from .matrix import MatrixMethod, matrix_shape, on_matrix
from .options import FrozenMap


@dataclass(frozen=True)
class HRA(MatrixMethod):
    """`W' = W·H₁·H₂⋯H_r`, each `H_i = I - 2·u_i·u_iᵀ / |u_i|²` a Householder reflection.

    r reflections are an orthogonal matrix that differs from the identity by rank r: OFT and LoRA at once. Columns of u
    start as equal pairs, whose reflections undo each other, so an adapted network of even rank starts as the base. The
    chain is never formed: it is `I - U·T·Uᵀ` with a triangular T of size r (the compact WY form).

    Shapes: hra_u `(in, r)`; a kernel is a matrix `(out, in/groups·k...)`; an embedding's features are reflected.

    Args:
        rank: r, the number of reflections.
        apply_gs: reflect along the columns made orthogonal by Gram-Schmidt, `H = I - 2·Q·Qᵀ`. Then equal pairs cannot be
            made orthogonal, columns start at random, and the network does not start as the base.
        rank_pattern: rank of the sites whose module name ends in what a key (a regular expression) matches; first hit.

    Raises:
        AdaptError: for a rank below 1.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(8, 2), gf.HRA(rank=4))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'hra_u': (8, 4)}

    References:
        Yuan et al., Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024
        (arXiv:2405.17484); Schreiber and Van Loan, A Storage-Efficient WY Representation, 1989.
    """

    whole = ("rank",)

    rank: int = 8
    _: KW_ONLY
    apply_gs: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)

    @property
    def starts_as_base(self) -> bool:
        return not self.apply_gs and not any(rank % 2 for rank in (self.rank, *self.rank_pattern.values()))

    def why_not(self, site: Site) -> str | None:
        if self.apply_gs and site.parameter.ndim >= 2:
            here = self.for_site(site)
            if here.rank > here._width(site.parameter.shape):
                return f"a width of at least rank={here.rank}, for as many orthogonal columns"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter = site.parameter
        lead = parameter.shape[:-2] if self.view == "stacked" else ()
        paired = not self.apply_gs and self.rank % 2 == 0
        shape = (*lead, self._width(parameter.shape), self.rank // 2 if paired else self.rank)
        u = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        u = u.uniform_(-1, 1, generator=generator) / sqrt(shape[-1])
        return {"hra_u": u.repeat_interleave(2, dim=-1) if paired else u}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        view = "matrix" if self.view == "lookup" else self.view
        return on_matrix(base, view, lambda matrix: HouseholderRotation(matrix, tensors["hra_u"], self.factors))

    def factors(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """U `(..., in, r)` and T·Uᵀ `(..., r, in)` of `H = I - U·T·Uᵀ`."""
        u = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.apply_gs:
            q = torch.linalg.qr(u).Q
            return q, 2 * q.mT
        u = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
        # T⁻¹ holds the products of different columns above its diagonal, and halves on it.
        eye = torch.eye(self.rank, dtype=u.dtype, device=u.device)
        inverse = torch.triu(u.mT @ u, diagonal=1) + eye / 2
        return u, torch.linalg.solve_triangular(inverse, u.mT, upper=True)

    def _width(self, shape: torch.Size) -> int:
        return matrix_shape(shape, self.view)[-2 if self.view == "lookup" else -1]
