"""VeRA: random projections that all sites share, and a trained scale for each of their dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import sqrt

import torch
from torch import Tensor

from ..select import Site
from ..weights import ScaledLowRank, Weight
from .factored import FactoredMethod
from .matrix import matrix_shape


@dataclass(frozen=True)
class VeRA(FactoredMethod):
    """`W' = W + diag(b)·B·diag(d)·A`: A and B are random, frozen and the same everywhere, b and d are trained.

    The random projections span enough to learn in, so a site costs `out + r` numbers. b starts at zero.

    Shapes: vera_lambda_b `(out,)`, vera_lambda_d `(r,)` for every site (`(E, out)` and `(E, r)` for a stack of E
    matrices); vera_A `(r, in)` and vera_B `(out, r)` once, as large as the largest in and the largest out among the
    sites of the rule: every site takes their first columns and rows. They are saved with the adapter. A kernel counts as
    the matrix `(out, in/groups·k...)`, transformers' Conv1D as `(out, in)`.

    Args:
        rank: r, at least 1; far more than LoRA's, since it costs little.
        projection_prng_key: seed of the projections, which are PEFT's for the same seed.
        d_initial: what d starts at.
        dropout: probability of dropping an input feature on its way into the change, in training only.
        dtype: element type of the tensors; None means that of the parameter (of the first site's for the projections).

    Raises:
        AdaptError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> adapted = gf.adapt(model, gf.VeRA(rank=6))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items() if not name.startswith("1")}
        {'vera_A': (6, 8), 'vera_B': (8, 6), '0.vera_lambda_b': (8,), '0.vera_lambda_d': (6,)}

    References:
        Kopiczko et al., VeRA, 2023 (arXiv:2310.11454).
    """

    whole = ("rank",)

    rank: int = 256
    _: KW_ONLY
    projection_prng_key: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0
    dtype: torch.dtype | None = None

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        *lead, rows, _ = matrix_shape(site.parameter.shape, self.layout)
        b = self.empty(site.parameter, *lead, rows).zero_()
        return {"vera_lambda_b": b, "vera_lambda_d": b.new_full((*lead, self.rank), self.d_initial)}

    def shared_tensors(self, sites: Sequence[Site], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = [matrix_shape(site.parameter.shape, self.for_site(site).layout)[-2:] for site in sites]
        rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        first = sites[0].parameter
        own = None if first.is_meta else torch.Generator().manual_seed(self.projection_prng_key)
        made = {}
        for name, shape in (("vera_A", (self.rank, columns)), ("vera_B", (rows, self.rank))):
            tensor = torch.empty(shape, device="meta" if own is None else "cpu")
            bound = sqrt(6 / shape[1])
            tensor.uniform_(-bound, bound, generator=own)
            made[name] = tensor.to(first.device, self.dtype or first.dtype)
        return made

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        rows, columns = matrix_shape(base.shape, self.layout)[-2:]
        inner, outer = tensors["vera_A"][:, :columns], tensors["vera_B"][:rows]
        if self.layout == "transposed":
            return ScaledLowRank(base, inner.mT, d, outer.mT, columns=b, dropout=self.dropout)
        return ScaledLowRank(base, outer, d, inner, rows=b, dropout=self.dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {"vera_A": (0,), "vera_B": (1,), "vera_lambda_d": (tensors["vera_lambda_d"].ndim - 1,)}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"vera_lambda_b": 1.0}
