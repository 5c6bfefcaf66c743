"""HiRA: a low-rank matrix modulates the weight's own elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..select import Site
from ..weights import LowRank, Modulated, Weight
from .factored import LowRankMethod
from .layout import factors_of, rank_axes
from .lora_init import first_factors
from .options import FrozenMap


@dataclass(frozen=True)
class HiRA(LowRankMethod):
    """`W' = W ⊙ (1 + B·A)`: each element of W changes in proportion to itself, by factors of low rank.

    A product with W, whose rank is high, is of high rank: as many parameters as LoRA, no limit on the rank of the change.
    B starts at zero.

    Shapes: hira_A and hira_B are `LoRA`'s lora_A and lora_B.

    Args:
        rank: r, at least 1.
        dropout: probability of dropping an input feature on its way into the change, in training only.
        init: `"kaiming"` or `"gaussian"`, as in `LoRA`, start as the base; `"random"` does not.
        rank_pattern: rank by module name, as in `LoRA`.
        dtype: element type of the tensors; None means that of the parameter.

    Raises:
        AdaptError: for a rank below 1, a dropout outside [0, 1), an unknown init.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 3), gf.HiRA(rank=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'hira_B': (3, 2), 'hira_A': (2, 4)}

    References:
        Huang et al., HiRA, 2025 (ICLR, openreview.net/forum?id=TwJrTz9cRS). A grouped convolution's kernel is modulated as
        the matrix `(out, in/groups·k...)` that it is.
    """

    rank: int = 32
    _: KW_ONLY
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian", "random"] = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        b, a = first_factors(self, site.parameter, generator)
        return {"hira_B": b, "hira_A": a}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        left, right = factors_of(tensors["hira_B"], tensors["hira_A"], self.layout)
        return Modulated(LowRank(base, left, right, dropout=self.dropout))

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        kernel = self.layout == "kernel"
        return {name: rank_axes(tensors[name], left=name == "hira_B", kernel=kernel) for name in ("hira_A", "hira_B")}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"hira_B": self.scale}
