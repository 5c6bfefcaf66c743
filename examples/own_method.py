"""A method of your own, in thirty lines, and the laws that it must obey.

The method: *diagonal scaling and a rank-one change*, `W' = diag(1 + g)·W + u·vᵀ`. A method is a frozen dataclass with two
pure functions. Training, merging, saving, vmap, per-sample gradients, compiling and checkpointing then work without more code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gift_func as gf
from gift_func import testing
from gift_func.weights import OnBase, Weight


@dataclass(frozen=True)
class ScaleAndNudge(gf.WeightMethod):
    """`W' = diag(1 + g)·W + u·vᵀ` for a matrix W, `(out, in)`; g and u start at zero."""

    spread: float = 0.02

    def why_not(self, site: gf.Site) -> str | None:
        return None if site.parameter.ndim == 2 else "a matrix"

    def init_tensors(self, site: gf.Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        zeros = site.parameter.new_zeros(site.parameter.shape[0])
        v = torch.empty_like(site.parameter[0]).normal_(std=self.spread, generator=generator)
        return {"nudge_g": zeros, "nudge_u": zeros.clone(), "nudge_v": v}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return Nudged(base, tensors["nudge_g"], tensors["nudge_u"], tensors["nudge_v"])


class Nudged(OnBase):
    """The adapted weight: `dense` defines it, and `linear` computes a layer without the matrix."""

    def __init__(self, base: Weight, g: Tensor, u: Tensor, v: Tensor) -> None:
        self.base, self.g, self.u, self.v = base, g, u, v

    def dense(self) -> Tensor:
        return (1 + self.g).unsqueeze(-1) * self.base.dense() + torch.outer(self.u, self.v)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = (1 + self.g) * self.base.linear(x) + (x @ self.v).unsqueeze(-1) * self.u
        return y if bias is None else y + bias


def main() -> None:
    # The laws: rule == dense, vmap == loop, gradients, merging, saving, one compile, ... on every kind of parameter.
    testing.check(ScaleAndNudge())
    print(f"{len(testing.LAWS)} laws hold on every host that takes a matrix")

    # A law does not know the formula. This does.
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    adapted = gf.adapt(model, {"weight": ScaleAndNudge()})
    g, u, v = torch.randn(4), torch.randn(4), torch.randn(6)
    adapted = adapted.with_adapter({"nudge_g": g, "nudge_u": u, "nudge_v": v})
    by_hand = x @ (torch.diag(1 + g) @ model.weight + torch.outer(u, v)).T + model.bias
    torch.testing.assert_close(adapted(x), by_hand)

    # It is data like any other method, and a file finds it again because it is defined here.
    with tempfile.TemporaryDirectory() as folder:
        gf.save_adapter(adapted, Path(folder) / "nudge.safetensors")
        loaded = gf.load_adapter(model, Path(folder) / "nudge.safetensors")
    assert torch.equal(loaded(x), adapted(x))
    print(adapted)


if __name__ == "__main__":
    main()
