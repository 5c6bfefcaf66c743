"""A weight in another shape: a kernel as a matrix, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .value import OnBase, Weight, as_weight


class Reshaped(OnBase):
    """The same elements in another shape.

    Args:
        base: the weight.
        shape: a shape with as many elements.
    """

    def __init__(self, base: Weight | Tensor, shape: torch.Size) -> None:
        self.base = as_weight(base)
        self.size = shape

    @property
    def shape(self) -> torch.Size:
        return self.size

    def dense(self) -> Tensor:
        return self.base.dense().reshape(self.size)
