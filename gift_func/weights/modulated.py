"""`W ⊙ (1 + D)`: the weight times one plus a low-rank matrix, element by element."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .low_rank import LowRank
from .value import Convolution, Index, OnBase, Weight, without_padding


class Modulated(OnBase):
    """`W ⊙ (1 + D)`.

    Args:
        base: `W + D` as a `LowRank`.
    """

    base: LowRank

    def __init__(self, base: Weight) -> None:
        assert isinstance(base, LowRank)
        self.base = base

    def _change(self) -> Tensor:
        v = self.base
        made: Tensor = (v.base.dense() * (v.left @ v.right).reshape(v.shape)).to(v.dtype)
        return made

    def dense(self) -> Tensor:
        # With dropout the low-rank weight raises an error that says why it has no dense form.
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
        return pick(self.eval().dense())  # dropout acts on input features, and indices have none

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        v = self.base
        if v.ndim != 2 or v.left.shape[0] != v.shape[0]:
            return super().choose(pick, padding)
        rows = v.base.choose(pick, padding)
        return rows + without_padding((rows * (pick(v.left) @ v.right)).to(rows.dtype), padding)

    @property
    def mT(self) -> Weight:
        transposed = self.base.mT
        return Modulated(transposed) if isinstance(transposed, LowRank) else super().mT

    def __getitem__(self, index: Index) -> Weight:
        part = self.base[index]
        return Modulated(part) if isinstance(part, LowRank) else super().__getitem__(index)
