"""AdaLoRA: the change in the form of a singular value decomposition, whose ranks are shared out while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..select import Site
from ..weights import ScaledLowRank, Weight
from .factored import LowRankMethod
from .layout import rank_axes
from .matrix import matrix_shape
from .options import FrozenMap
from .rank_allocation import Importance as Importance
from .rank_allocation import allocate as allocate
from .rank_allocation import budget_at as budget_at
from .rank_allocation import importance as importance
from .rank_allocation import orthogonality_loss as orthogonality_loss
from .rank_allocation import triplet_scores as triplet_scores


@dataclass(frozen=True)
class AdaLoRA(LowRankMethod):
    """`W' = W + s·P·diag(λ)·Q` with `s = alpha / rank`: every rank is a triplet that can be switched off by its λ.

    Training keeps P and Q near orthogonal by adding `orthogonality_loss`, follows how much each triplet matters by
    `importance`, and lets a falling number of them live by `allocate`: weights that need more rank keep more of it.
    λ starts at zero.

    Shapes: lora_B (P) `(out, r)`, lora_E (λ) `(r, 1)`, lora_A (Q) `(r, in)`; stacks of matrices lead with their
    dimensions. A kernel counts as the matrix `(out, in/groups·k...)`, transformers' Conv1D as `(out, in)`.

    Args:
        rank: r to start from, at least 1: half as much again as is wanted on average in the end.
        alpha: the numerator of s; None means alpha = rank, hence s = 1.
        dropout: probability of dropping an input feature on its way into the change, in training only.
        init: `"normal"` (P and Q of deviation 0.02, λ zero), `"random"` (λ normal: not the identity).
        rank_pattern: rank by module name, as in `LoRA`.
        alpha_pattern: the same for alpha.
        dtype: element type of the tensors; None means that of the parameter.

    Raises:
        AdaptError: for a rank below 1, a dropout outside [0, 1), an unknown init.

    Example:
        >>> import torch, gift_func as gf
        >>> from gift_func.methods.adalora import allocate, budget_at, importance, orthogonality_loss
        >>> adapted = gf.adapt(torch.nn.Linear(4, 3), gf.AdaLoRA(rank=3))
        >>> (adapted(torch.ones(1, 4)).sum() + 0.5 * orthogonality_loss(adapted.adapter)).backward()
        >>> scores = importance(adapted.adapter, {name: p.grad for name, p in adapted.adapter.items()})
        >>> budget = budget_at(8, 10, initial=3, target=1, warmup=2, final=2)
        >>> _ = adapted.load_adapter_state_dict(allocate(adapted.adapter, scores, budget))

    References:
        Zhang et al., AdaLoRA, 2023 (arXiv:2303.10512). PEFT divides by rank + 1e-5.
    """

    rank: int = 12
    _: KW_ONLY
    alpha: float | None = None
    dropout: float = 0.0
    init: Literal["normal", "random"] = "normal"
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, r = site.parameter, self.rank
        *lead, rows, columns = matrix_shape(parameter.shape, self.layout)
        a = self.empty(parameter, *lead, r, columns).normal_(std=0.02, generator=generator)
        b = self.empty(parameter, *lead, rows, r).normal_(std=0.02, generator=generator)
        e = self.empty(parameter, *lead, r, 1).zero_()
        return {"lora_A": a, "lora_B": b, "lora_E": e if self.starts_as_base else e.normal_(generator=generator)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        q, p, values = tensors["lora_A"], tensors["lora_B"], tensors["lora_E"].squeeze(-1)
        outer, inner = (q.mT, p.mT) if self.layout == "transposed" else (p, q)
        return ScaledLowRank(base, outer, values, inner, scale=self.scale, dropout=self.dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: rank_axes(tensors[name], left=name == "lora_B") for name in ("lora_A", "lora_B", "lora_E")}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"lora_E": self.scale}
