"""AdaLoRA's allocation of ranks in training: the importance of every triplet, and the decreasing number that stay active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdaptError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """How much each element of an adapter matters, smoothed over steps.

    Attributes:
        sensitivity: by tensor name, the moving average of |θ·gradient|.
        uncertainty: by tensor name, the moving average of the distance of |θ·gradient| from it.
    """

    sensitivity: State
    uncertainty: State


def orthogonality_loss(state: State, *, squared: bool = True) -> Tensor:
    """How far P and Q are from orthonormal: `Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖²` over all sites.

    Args:
        state: an adapter's tensors by name; only AdaLoRA's are used.
        squared: as in the paper. False, as in the authors' code and PEFT: the mean of the norms, not squared.
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
        state: an adapter's tensors by name; only AdaLoRA's are used.
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
    """The state with only the `budget` most important triplets of all sites active: the λ of all others is set to zero.

    Args:
        state: an adapter's tensors by name.
        scores: from `importance`. In the final steps of training, those of the last step before them, so that the choice
            does not change.
        budget: how many triplets stay active, over all sites.
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
    """How many triplets may be active at a step: all, then fewer by a cubic schedule, then the target.

    Args:
        step: from 0.
        total: number of steps.
        initial: triplets at the start: the sum of the ranks.
        target: triplets in the end: the wanted rank times the number of sites.
        warmup: first steps, in which all are active.
        final: last steps, in which the choice does not change.
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
