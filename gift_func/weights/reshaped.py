"""A weight in another shape: a kernel as a matrix, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .value import Weight, as_weight


class Reshaped(Weight):
    """The same elements in another shape.

    Args:
        weight: the weight.
        shape: a shape with as many elements.
    """

    def __init__(self, weight: Weight | Tensor, shape: torch.Size) -> None:
        self.weight = as_weight(weight)
        self.size = shape

    @property
    def shape(self) -> torch.Size:
        return self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def needs_input(self) -> bool:
        return self.weight.needs_input

    def dense(self) -> Tensor:
        return self.weight.dense().reshape(self.size)
