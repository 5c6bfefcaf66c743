"""What a call of a tiny network costs beyond its arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import gift_func as gf

from .measure import Case, Scale
from .pairs import pair

RATIOS = (("ours", "PEFT"), ("functional", "PEFT"), ("ours", "base"))


def call(scale: Scale) -> Case:
    """A call of an MLP 64-64-64 at batch 1, without gradients."""
    return overhead(torch.no_grad())


def training_call(scale: Scale) -> Case:
    """The same with its backward."""
    return overhead(None)


def overhead(around: torch.no_grad | None) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(1, 64)
    ours, theirs = pair(model, gf.LoRA(rank=8), lambda m: [m(x)])
    params = dict(ours.named_trainable_parameters())

    def calling(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            if around is None:
                forward().sum().backward()
            else:
                with around:
                    forward()

        return run

    calls = {
        "base": calling(lambda: model(x)),
        "ours": calling(lambda: ours(x)),
        "functional": calling(lambda: gf.functional_call(ours, params, (x,))),
        "PEFT": calling(lambda: theirs(x)),
    }
    return Case(calls, RATIOS, targets={"ours/PEFT": 1.0})
