"""The initialisations of LoRA's factors `B (..., out, r)` and `A (..., r, in)`, by the name of `init`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..errors import AdaptError
from .factored import LowRankMethod, uniform
from .layout import as_stored
from .matrix import matrix_shape

Factors = tuple[Tensor, Tensor]
Init = Callable[[LowRankMethod, Tensor, torch.Generator | None], Factors]

RESIDUAL = ("pissa", "olora")
"""Prefixes of the initialisations that start at a part B₀·A₀ of W itself."""


def first_factors(method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None) -> Factors:
    """Initial B and A as an adapter stores them, of a method as it applies to the parameter's site."""
    b, a = initialisation(method.init)(method, parameter, generator)
    return as_stored(b, a, parameter.shape, method.layout)


def initialisation(init: str) -> Init:
    """The initialisation of that name.

    Raises:
        AdaptError: for an unknown one.
    """
    iterations = re.fullmatch(r"pissa_niter_(\d+)", str(init))
    if iterations:
        return partial(pissa, iterations=int(iterations[1]))
    if str(init) not in INITS:
        raise AdaptError(f"init is one of {', '.join(INITS)}, pissa_niter_<iterations>, got init={init!r}")
    return INITS[init]


def kaiming(method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None) -> Factors:
    """A uniform in ±1/sqrt(fan_in), B zero."""
    b, a = _blank(method, parameter)
    return b.zero_(), uniform(a, a.shape[-1], generator)


def gaussian(method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None) -> Factors:
    """A normal with deviation 1/rank, B zero."""
    b, a = _blank(method, parameter)
    return b.zero_(), a.normal_(std=1 / method.rank, generator=generator)


def orthogonal(method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None) -> Factors:
    """Neither zero, but their product: each takes one half of the rows of an orthogonal matrix, so the rank must be even."""
    b, a = _blank(method, parameter)
    rank, half = method.rank, method.rank // 2
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    mix = a.new_empty(rank, rank, dtype=wide).normal_(generator=generator)
    q = torch.linalg.qr(mix).Q.to(a.dtype) / 10
    a = q[0::2].mT @ a.new_empty(*a.shape[:-2], half, a.shape[-1]).normal_(generator=generator)
    return b.new_empty(*b.shape[:-1], half).normal_(generator=generator) @ q[1::2], a


def random(method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None) -> Factors:
    """Both uniform: not the identity."""
    b, a = kaiming(method, parameter, generator)
    return uniform(b, method.rank, generator), a


def pissa(
    method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None, iterations: int | None = None
) -> Factors:
    """The first `rank` singular directions of W, each factor with the root of σ/s.

    Args:
        iterations: number of power iterations of a randomised decomposition; None means an exact one.
    """
    fresh, matrix = kaiming(method, parameter, generator), _wide_matrix(method, parameter)
    rank = min(method.rank, *matrix.shape[-2:])
    basis = None
    if iterations is not None:  # Halko et al., 2011: an orthonormal basis of the range, by power iterations
        mixed = matrix.new_empty(*matrix.shape[:-2], matrix.shape[-1], rank).normal_(generator=generator)
        basis = torch.linalg.qr(matrix @ mixed).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, sigma, vh = torch.linalg.svd(matrix if basis is None else basis.mT @ matrix, full_matrices=False)
    root = (sigma[..., :rank] / method.scale).sqrt()
    u = u if basis is None else basis @ u
    return _completed((u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]), fresh)


def olora(method: LowRankMethod, parameter: Tensor, generator: torch.Generator | None) -> Factors:
    """The first `rank` columns of Q and rows of R, W = Q·R."""
    fresh, matrix = kaiming(method, parameter, generator), _wide_matrix(method, parameter)
    rank = min(method.rank, *matrix.shape[-2:])
    q, r = torch.linalg.qr(matrix)
    return _completed((q[..., :rank], r[..., :rank, :]), fresh)


INITS: dict[str, Init] = {init.__name__: init for init in (kaiming, gaussian, orthogonal, random, pissa, olora)}


def _blank(method: LowRankMethod, parameter: Tensor) -> Factors:
    """B and A as uninitialised matrices."""
    *lead, rows, columns = matrix_shape(parameter.shape, method.layout)
    return method.empty(parameter, *lead, rows, method.rank), method.empty(parameter, *lead, method.rank, columns)


def _wide_matrix(method: LowRankMethod, parameter: Tensor) -> Tensor:
    """W as a matrix, in an element type that has decompositions."""
    shape = matrix_shape(parameter.shape, method.layout)
    matrix = parameter.detach().mT if method.layout == "transposed" else parameter.detach().reshape(shape)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _completed(found: Factors, fresh: Factors) -> Factors:
    """Factors with fewer directions than the rank, completed by the last directions of fresh ones."""
    (b, a), (fresh_b, fresh_a) = found, fresh
    rank = b.shape[-1]
    b = torch.cat([b.to(fresh_b.dtype), fresh_b[..., rank:]], dim=-1)
    return b, torch.cat([a.to(fresh_a.dtype), fresh_a[..., rank:, :]], dim=-2)
