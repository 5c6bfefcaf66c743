"""Dropout of a change's outputs; the dropout of other weights is of the change's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class OutputDropout:
    """Dropout of a change's outputs, and of the change as a whole, as in LyCORIS and PEFT.

    Attributes:
        rows: probability of dropping the change of an output.
        rescale: divide the changes that are not dropped by their share of all.
        whole: probability of dropping the change as a whole.
    """

    rows: float = 0.0
    rescale: bool = False
    whole: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.rows or self.whole)

    def factor(self, like: Tensor, *shape: int) -> Tensor:
        """A new random factor, of this shape, for the outputs' changes."""
        kept = (F.dropout(like.new_ones(shape), self.rows) > 0).to(like.dtype)
        if self.rescale:
            kept = kept / kept.mean(-1, keepdim=True).clamp(min=1 / shape[-1])
        return kept * (F.dropout(like.new_ones(1), self.whole) > 0)


NO_DROPOUT = OutputDropout()
