"""AdaLoRA: the change in the form of a singular value decomposition, whose ranks are shared out while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from ..errors import AdaptError
from ..select import Site
from ..weights import Triple, Weight
from .lora import Layout, OnMatrices, check_dropout, layout_of, matrix_of, rank_axes, refuses_dropout
from .method import FrozenMap, check_choice, check_whole, option, settings, settled

State = Mapping[str, Tensor]


@settings
class AdaLoRA(OnMatrices):
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
    initialization: Literal["normal", "random"] = option(default="normal", alias="init")
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None
    layout: Layout = settled(default="matrix")

    def __post_init__(self) -> None:
        check_whole(self, "rank")
        check_dropout(self.dropout)
        check_choice("init", self.initialization, ("normal", "random"))

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def starts_as_base(self) -> bool:
        return self.initialization != "random"

    def refuses(self, site: Site) -> str | None:
        return super().refuses(site) or refuses_dropout(self.dropout, site)

    def at(self, site: Site) -> Self:
        return super().at(site).but(layout=layout_of(site))

    def init(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, r = site.parameter, self.rank
        lead, rows, columns = matrix_of(parameter.shape, self.layout)
        empty = torch.empty(0, dtype=self.dtype or parameter.dtype, device=parameter.device)
        a = empty.new_empty(*lead, r, columns).normal_(std=0.02, generator=generator)
        b = empty.new_empty(*lead, rows, r).normal_(std=0.02, generator=generator)
        e = empty.new_zeros(*lead, r, 1)
        return {"lora_A": a, "lora_B": b, "lora_E": e if self.starts_as_base else e.normal_(generator=generator)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        q, p, values = tensors["lora_A"], tensors["lora_B"], tensors["lora_E"].squeeze(-1)
        outer, inner = (q.mT, p.mT) if self.layout == "transposed" else (p, q)
        return Triple(base, outer, values, inner, scale=self.scale, dropout=self.dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: rank_axes(tensors[name], left=name == "lora_B") for name in ("lora_A", "lora_B", "lora_E")}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"lora_E": self.scale}


@dataclass(frozen=True)
class Importance:
    """How much each element of an adapter matters, smoothed over steps.

    Attributes:
        sensitivity: by tensor name, the moving average of |θ·gradient|.
        uncertainty: by tensor name, the moving average of how far |θ·gradient| is from it.
    """

    sensitivity: State
    uncertainty: State


def orthogonality_loss(state: State, *, squared: bool = True) -> Tensor:
    """How far P and Q are from orthonormal: `Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖²` over all sites.

    Args:
        state: an adapter's tensors by name; only AdaLoRA's count.
        squared: as in the paper. False is the authors' code and PEFT: the mean of the norms, not squared.
    """
    grams = []
    for site in _sites(state):
        p, q = state[f"{site}lora_B"], state[f"{site}lora_A"]
        grams += [p.mT @ p, q @ q.mT]
    off = [gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) for gram in grams]
    if squared:
        return torch.stack([o.square().sum() for o in off]).sum()
    return torch.stack([torch.linalg.matrix_norm(o).mean() for o in off]).mean()


def importance(
    state: State, gradients: State, previous: Importance | None = None, *, beta1: float = 0.85, beta2: float = 0.85
) -> Importance:
    """The importance after one more step.

    Args:
        state: an adapter's tensors by name; only AdaLoRA's count.
        gradients: of the loss, by the same names.
        previous: the importance before; None at the first step.
        beta1: weight of the past in the sensitivity.
        beta2: weight of the past in the uncertainty.
    """
    sensitivity, uncertainty = {}, {}
    for name in (f"{site}lora_{part}" for site in _sites(state) for part in "AEB"):
        now = (state[name].detach() * gradients[name].detach()).abs()
        before = (previous.sensitivity[name], previous.uncertainty[name]) if previous else (0.0, 0.0)
        sensitivity[name] = beta1 * before[0] + (1 - beta1) * now
        uncertainty[name] = beta2 * before[1] + (1 - beta2) * (now - sensitivity[name]).abs()
    return Importance(sensitivity, uncertainty)


def triplet_scores(scores: Importance) -> dict[str, Tensor]:
    """`S = s(λ) + mean s(P) + mean s(Q)` with s = sensitivity·uncertainty, by the name of λ, of λ's shape."""
    found = {}
    for site in _sites(scores.sensitivity):
        e, a, b = (scores.sensitivity[n] * scores.uncertainty[n] for n in (f"{site}lora_{part}" for part in "EAB"))
        found[f"{site}lora_E"] = e + a.mean(-1, keepdim=True) + b.mean(-2).unsqueeze(-1)
    return found


def allocate(state: State, scores: Importance, budget: int) -> dict[str, Tensor]:
    """The state in which only the `budget` most important triplets of all sites live: the λ of all others is zero.

    Args:
        state: an adapter's tensors by name.
        scores: from `importance`. In the final steps of training, that of the last step before them, so that the choice
            stays.
        budget: how many triplets live, over all sites.
    """
    by_name = triplet_scores(scores)
    flat = torch.cat([score.reshape(-1) for score in by_name.values()])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(min(max(budget, 0), flat.numel())).indices] = True
    made = {name: tensor.detach().clone() for name, tensor in state.items()}
    for (name, score), mask in zip(by_name.items(), kept.split([s.numel() for s in by_name.values()]), strict=True):
        made[name] = torch.where(mask.reshape(score.shape), made[name], 0)
    return made


def budget_at(step: int, total: int, *, initial: int, target: int, warmup: int = 0, final: int = 0) -> int:
    """How many triplets may live at a step: all, then fewer as a cube falls, then the target.

    Args:
        step: from 0.
        total: number of steps.
        initial: triplets at the start: the sum of the ranks.
        target: triplets in the end: the wanted rank times the number of sites.
        warmup: first steps, in which all live.
        final: last steps, in which the choice stays.
    """
    if step <= warmup:
        return initial
    if step >= total - final:
        return target
    return int(target + (initial - target) * (1 - (step - warmup) / (total - final - warmup)) ** 3)


def _sites(state: State) -> Iterator[str]:
    """The names of AdaLoRA's sites, with the dot."""
    found = [name.removesuffix("lora_E") for name in state if name == "lora_E" or name.endswith(".lora_E")]
    if not found:
        raise AdaptError(f"there is no AdaLoRA tensor (lora_E) among the {len(state)} given")
    return iter(found)
