"""`W + s·(B·A − B₀·A₀)`: the change of a low-rank product since the start of training."""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import LowRank
from .value import Weight

Pair = tuple[Tensor, Tensor]


class LowRankFromStart(LowRank):
    """`W + s·reshape(left @ right − left₀ @ right₀)`.

    It is computed as the low-rank weight of `[left − left₀, left₀] @ [right; right − right₀]`: the same change, but exactly
    zero at the start, and without the cancellation of two large products later.

    Args:
        base, scale, dropout: as in `LowRank`.
        now: left and right.
        start: left₀ and right₀, of the same shapes.
    """

    def __init__(self, base: Weight, now: Pair, start: Pair, scale: float | Tensor, dropout: float = 0.0) -> None:
        self.base = base
        self._left, self._right = now
        self._left0, self._right0 = start
        self.scale = scale
        self.dropout = dropout

    # Properties, since a weight stays bound between calls while its tensors are trained.
    @property
    def left(self) -> Tensor:  # type: ignore[override]
        return torch.cat([self._left - self._left0, self._left0], dim=-1)

    @property
    def right(self) -> Tensor:  # type: ignore[override]
        return torch.cat([self._right, self._right - self._right0], dim=-2)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return LowRank(self.base, self.left, self.right, self.scale, self.dropout).linear(x, bias)
