"""HiRA: a low-rank matrix modulates the weight's own elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, field
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..select import Site
from ..weights import LowRank, OnBase, Weight
from ..weights.value import Convolution
from .lora import Layout, LoRA, OnMatrices, check_dropout, factors_of, layout_of, rank_axes, refuses_dropout
from .method import FrozenMap, check_choice, check_whole, option, settings, settled


class Modulated(OnBase):
    """`W ⊙ (1 + D)`, for `W + D` of low rank."""

    base: LowRank

    def __init__(self, base: Weight) -> None:
        assert isinstance(base, LowRank)
        self.base = base

    def _change(self) -> Tensor:
        v = self.base
        made: Tensor = (v.base.dense() * (v.left @ v.right).reshape(v.shape)).to(v.dtype)
        return made

    def dense(self) -> Tensor:
        # Where dropout is on, the low-rank weight refuses to be formed, and says why.
        return self.base.base.dense() + self._change() if not self.base.dropout else self.base.dense()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        v = self.base
        if not v.dropout:
            return super().linear(x, bias)
        return v.base.linear(x, bias) + F.dropout(x, v.dropout) @ self._change().mT

    def convolve(self, x: Tensor, conv: Convolution, bias: Tensor | None = None) -> Tensor:
        v = self.base
        if not v.dropout:
            return super().convolve(x, conv, bias)
        return v.base.convolve(x, conv, bias) + conv(F.dropout(x, v.dropout), self._change(), None)

    def lookup(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        return pick(self.eval().dense())  # indices are no features, so there is nothing for dropout to drop

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        v = self.base
        if v.ndim != 2 or v.left.shape[0] != v.shape[0]:
            return super().choose(pick, padding)
        rows = v.base.choose(pick, padding)
        change = (rows * (pick(v.left) @ v.right)).to(rows.dtype)
        return rows + (change if padding is None else torch.where(padding.unsqueeze(-1), change.detach(), change))

    @property
    def mT(self) -> Weight:  # noqa: N802
        turned = self.base.mT
        return Modulated(turned) if isinstance(turned, LowRank) else super().mT

    def __getitem__(self, index: Any) -> Weight:
        part = self.base[index]
        return Modulated(part) if isinstance(part, LowRank) else super().__getitem__(index)

    def eval(self) -> Weight:
        return Modulated(self.base.eval())


@settings
class HiRA(OnMatrices):
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
    initialization: Literal["kaiming", "gaussian", "random"] = option(default="kaiming", alias="init")
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None
    layout: Layout = settled(default="matrix")

    def __post_init__(self) -> None:
        check_whole(self, "rank")
        check_dropout(self.dropout)
        check_choice("init", self.initialization, ("kaiming", "gaussian", "random"))

    @property
    def starts_as_base(self) -> bool:
        return self.initialization != "random"

    def refuses(self, site: Site) -> str | None:
        return super().refuses(site) or refuses_dropout(self.dropout, site)

    def at(self, site: Site) -> Self:
        return super().at(site).but(layout=layout_of(site))

    def init(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        made = self._lora().init(site, generator)
        return {name.replace("lora", "hira"): tensor for name, tensor in made.items()}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        left, right = factors_of(tensors["hira_B"], tensors["hira_A"], self.layout)
        return Modulated(LowRank(base, left, right, dropout=self.dropout))

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        kernel = self.layout == "kernel"
        return {name: rank_axes(tensors[name], left=name == "hira_B", kernel=kernel) for name in ("hira_A", "hira_B")}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"hira_B": 1.0}

    def _lora(self) -> LoRA:
        """LoRA with tensors of the same shapes."""
        lora = LoRA(self.rank, dropout=self.dropout, init=self.initialization, dtype=self.dtype)
        return lora.but(layout=self.layout)
