"""A module's tensors in a kohya or LyCORIS file, and the formats in which they change a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import FileError, nearest
from ...methods import WeightMethod
from ...select import Site

TensorDict = dict[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModuleTensors:
    """The tensors of one module in a file, by the part of their names after the module's, which has underscores for dots.

    What reads a tensor takes it, so that those that nothing reads remain.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self.remaining = dict(tensors)

    def take(self, name: str) -> Tensor:
        """Remove a tensor of real numbers, and return it; it is an error if it is missing or of another dtype."""
        if name not in self.remaining:
            raise FileError(f"the file lacks {self.name}.{name}; {nearest(name, self.remaining)}")
        tensor = self.remaining.pop(name)
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
            raise FileError(f"{self.name}.{name} is of {tensor.dtype}, and supported are {kinds}")
        return tensor

    def matrix(self, name: str) -> Tensor:
        """Remove a factor of a product, and return it; a linear layer's may be stored as a convolution's of size 1."""
        tensor = self.take(name)
        if tensor.ndim < 2:
            raise FileError(f"{self.name}.{name} is to be a factor of a product, and has the shape {tuple(tensor.shape)}")
        return tensor

    def scalar(self, name: str, default: float) -> float:
        """Remove a tensor of one number and return the number, or the default if there is no such tensor."""
        if name not in self.remaining:
            return default
        tensor = self.remaining.pop(name)
        if tensor.numel() != 1:
            raise FileError(f"{self.name}.{name} is to be one number, and has the shape {tuple(tensor.shape)}")
        return float(tensor)

    def alpha(self, rank: int) -> float | None:
        """The numerator of the scale alpha / rank; None if it is the rank, 0 or missing."""
        alpha = self.scalar("alpha", 0.0)
        return None if alpha in (0.0, rank) else alpha


ReadChange = Callable[[ModuleTensors, Site], tuple[WeightMethod, TensorDict]]
"""Reads the change of a weight: returns the method that it stands for, and the method's tensors."""

WriteChange = Callable[[WeightMethod, TensorDict, Site, Tensor], TensorDict]
"""Returns a method's tensors by their names in a file; the last argument is the base's weight."""


class ChangeFormat:
    """One format in which a file changes a weight.

    Args:
        label: its name in errors.
        marks: the tensors by any of which it is recognised, separated by spaces.
        others: the tensors that it may have besides.
        read: reads it.
    """

    def __init__(self, label: str, marks: str, others: str, read: ReadChange) -> None:
        self.label = label
        self.marks = frozenset(marks.split())
        self.tensors = self.marks | frozenset(others.split())
        self.read = read
