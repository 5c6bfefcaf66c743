"""Dropout of a change's outputs, where the dropout of other weights is of an operation's inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class OutputDropout:
    """Dropout of a change's outputs, and of the whole of it, as LyCORIS and PEFT have it.

    Attributes:
        rows: probability of leaving the change of an output out.
        rescale: divide those that stay by their share.
        whole: probability of leaving all of it out.
    """

    rows: float = 0.0
    rescale: bool = False
    whole: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.rows or self.whole)

    def factor(self, like: Tensor, *shape: int) -> Tensor:
        """What the outputs' changes are multiplied by, drawn anew."""
        kept = (F.dropout(like.new_ones(shape), self.rows) > 0).to(like.dtype)
        if self.rescale:
            kept = kept / kept.mean(-1, keepdim=True).clamp(min=1 / shape[-1])
        return kept * (F.dropout(like.new_ones(1), self.whole) > 0)


NO_DROPOUT = OutputDropout()
