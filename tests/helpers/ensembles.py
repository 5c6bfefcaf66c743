"""Members to put into an ensemble."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import gift_func as gf

from .models import MLP, shake


def members_of(model: nn.Module, *strategies: Any) -> list[gf.AdaptedModel]:
    """Adapted models far from their starts, and from each other."""
    made = [gf.adapt(model, strategy, generator=torch.Generator().manual_seed(i)) for i, strategy in enumerate(strategies)]
    return [shake(member, seed=index, size=0.3) for index, member in enumerate(made)]


def part(tree: Any, index: int) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[index], tree)


RANKED: dict[str, list[Any]] = {
    "LoRA": [gf.LoRA(rank=1), gf.LoRA(rank=4, alpha=3.0), gf.LoRA(rank=2, alpha=3.0, rslora=True)],
    "LoRA starts": [gf.LoRA(rank=2, init="gaussian"), gf.LoRA(rank=4, init="orthogonal"), gf.LoRA(rank=1)],
    "LoRA pissa": [gf.LoRA(rank=1, init="pissa", alpha=2.0), gf.LoRA(rank=3, init="pissa")],
    "DoRA": [gf.DoRA(rank=1), gf.DoRA(rank=3, alpha=2.0)],
    "VeRA": [gf.VeRA(rank=2), gf.VeRA(rank=5)],
    "LoHa": [gf.LoHa(rank=1), gf.LoHa(rank=3, alpha=2.0)],
    "HiRA": [gf.HiRA(rank=1), gf.HiRA(rank=3)],
    "AdaLoRA": [gf.AdaLoRA(rank=1, alpha=2.0), gf.AdaLoRA(rank=3)],
    "LoKr": [gf.LoKr(rank=1, alpha=2.0, decompose_factor=2), gf.LoKr(rank=1, alpha=3.0, decompose_factor=2)],
}


PLACES: dict[str, list[Any]] = {
    name: [{"layers.0": method}, {"layers.2": method}, {"layers.*": method}]
    for name, method in {
        "LoRA": gf.LoRA(rank=2), "DoRA": gf.DoRA(rank=2), "IA3": gf.IA3(), "OFT": gf.OFT(2), "Full": gf.Full(),
        "VeRA": gf.VeRA(rank=3), "SVDiff": gf.SVDiff(), "HRA": gf.HRA(2), "LoHa": gf.LoHa(rank=2), "BOFT": gf.BOFT(2),
    }.items()
}  # fmt: skip


PLACES["VeRA"] = [{"layers.0": gf.VeRA(rank=3)}, {"layers.*": gf.VeRA(rank=3)}]
PLACES["LoRA ranks"] = [{"layers.0": gf.LoRA(rank=1)}, {"layers.2": gf.LoRA(rank=3)}, gf.LoRA(rank=2, alpha=5.0)]
PLACES["DoRA ranks"] = [{"layers.0": gf.DoRA(rank=1)}, {"layers.*": gf.DoRA(rank=3)}]
UNEVEN = RANKED | {f"{name} in places": strategies for name, strategies in PLACES.items()}


def uneven(name: str) -> list[gf.AdaptedModel]:
    return members_of(nn_mlp(), *UNEVEN[name])


def nn_mlp() -> nn.Module:
    """An MLP whose sizes all methods can divide."""
    torch.manual_seed(0)
    return MLP(8, 8, 4).double()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8).sin()
