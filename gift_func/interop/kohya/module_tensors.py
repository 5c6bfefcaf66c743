"""One module's tensors in a file, and one module's tensors on their way into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import FileError, nearest
from ...methods import WeightMethod
from ...select import Site

Tensors = dict[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModuleTensors:
    """What a file holds for one module; readers take from it until nothing is left.

    Args:
        called: the module's name in the file.
        tensors: the tensors by what comes after that name.
    """

    def __init__(self, called: str, tensors: Mapping[str, Tensor]) -> None:
        self.called = called
        self.left = dict(tensors)

    def take(self, name: str) -> Tensor:
        """A tensor of real numbers.

        Raises:
            FileError: if it is not there, or holds none.
        """
        if name not in self.left:
            raise FileError(f"the file lacks {self.called}.{name}; {nearest(name, self.left)}")
        tensor = self.left.pop(name)
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
            raise FileError(f"{self.called}.{name} is of {tensor.dtype}, and supported are {kinds}")
        return tensor

    def matrix(self, name: str) -> Tensor:
        """A factor that is a matrix, however it is stored: a linear layer's may be a convolution's of size 1.

        Raises:
            FileError: if it is none.
        """
        tensor = self.take(name)
        if tensor.ndim < 2:
            raise FileError(f"{self.called}.{name} is to be a factor of a product, and has the shape {tuple(tensor.shape)}")
        return tensor

    def scalar(self, name: str, default: float) -> float:
        """One number, or the default where there is none."""
        if name not in self.left:
            return default
        tensor = self.left.pop(name)
        if tensor.numel() != 1:
            raise FileError(f"{self.called}.{name} is to be one number, and has the shape {tuple(tensor.shape)}")
        return float(tensor)

    def alpha(self, rank: int) -> float | None:
        """The numerator of the scale alpha / rank: None where it is the rank, or 0, or missing."""
        alpha = self.scalar("alpha", 0.0)
        return None if alpha in (0.0, rank) else alpha


Reader = Callable[[ModuleTensors, Site], tuple[WeightMethod, Tensors]]
"""Takes a weight's change from a file: the method it stands for, and that one's tensors."""

Writer = Callable[[WeightMethod, Tensors, Site, Tensor], Tensors]
"""Gives a method's tensors as a file has them; the last argument is the base's own weight."""


class Kind:
    """A row of the table: one way in which a file changes a weight.

    Args:
        label: its name, in errors.
        marks: the tensors that tell it, each by itself, with blanks between them.
        others: what more it may have.
        read: what takes it from a file.
    """

    def __init__(self, label: str, marks: str, others: str, read: Reader) -> None:
        self.label = label
        self.marks = frozenset(marks.split())
        self.tensors = self.marks | frozenset(others.split())
        self.read = read
