"""Structured weights: values that a parameter's name is bound to, and that act without being computed as a whole.

An operation calls a method of the weight (`linear`, `convolve`, `lookup`), whose default uses `dense()`.
So every weight is correct under every operation, and fast where it overrides the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import AdaptError

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Index = Any
Side = Literal["output", "input"]


class Weight(ABC):
    """A tensor-shaped value that takes a parameter's place.

    A subclass holds tensors and other weights as attributes, and is never changed after it was made.
    `dense()` defines what it is; the other methods are operations on it, which a subclass may
    compute faster than from the dense weight. An attribute called `dropout` acts in training only.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Element type of the dense weight."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the dense weight."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight as one tensor of shape `shape`."""

    @property
    def ndim(self) -> int:
        """Number of dimensions of the dense weight."""
        return len(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.mT + bias`.

        Args:
            x: input, shape `(..., d_in)`.
            bias: shape `(d_out,)`, or None.

        Returns:
            Shape `(..., d_out)` for a weight of shape `(d_out, d_in)`; a weight with leading
            dimensions broadcasts them against those of `x`, as `torch.matmul` does.
        """
        return dense_linear(x, self.dense(), bias)

    def convolve(self, x: Tensor, conv: Convolution, bias: Tensor | None = None) -> Tensor:
        """`conv(x, W, bias)`, where `conv` has its stride, padding and so on, and is linear in x and in W."""
        return conv(x, self.dense(), bias)

    def lookup(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        """`pick(W)`, where `pick` selects and sums rows and is linear in W.

        Args:
            pick: e.g. `F.embedding` for fixed indices.
            padding: which of the picked rows are padding and get no gradient; None for none.
        """
        return pick(self.dense())

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        """`lookup` for a `pick` that only selects rows, one for each index, and so takes rows of any element type."""
        return self.lookup(pick, padding)

    @property
    def mT(self) -> Weight:
        """The weight with its last two dimensions exchanged."""
        return Transposed(self)

    def __getitem__(self, index: Index) -> Weight:
        """The part of the weight at an index or a slice of its first dimension."""
        return Dense(self.dense()[index])

    def replace(self, **changes: Any) -> Self:
        """The same weight with some attributes changed."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)
        return made

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same weight with `function` applied to every tensor it holds."""
        made = object.__new__(type(self))
        for name, item in self.__dict__.items():
            if isinstance(item, Tensor):
                item = function(item)
            elif isinstance(item, Weight):
                item = item.map(function)
            object.__setattr__(made, name, item)
        return made

    def leaves(self) -> list[Tensor]:
        """All tensors of the weight and of the weights in it."""
        found: list[Tensor] = []
        for item in self.__dict__.values():
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, Weight):
                found.extend(item.leaves())
        return found

    def detach(self) -> Self:
        """The same weight, detached from the autograd graph."""
        return self.map(torch.Tensor.detach)

    def eval(self) -> Weight:
        """The weight as it acts outside training: the weights in it too, and without its `dropout`, if it has one."""
        changes: dict[str, Any] = {}
        for name, item in self.__dict__.items():
            if isinstance(item, Weight):
                inner = item.eval()
                if inner is not item:
                    changes[name] = inner
            elif name == "dropout" and item:
                changes[name] = type(item)()  # 0.0, or an OutputDropout that leaves nothing out
        return self.replace(**changes) if changes else self

    @property
    def needs_input(self) -> bool:
        """Whether the weight has no dense form, because a part of it acts on an operation's input."""
        return False

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor or weight that it holds requires a gradient."""
        return any(getattr(item, "requires_grad", False) for item in self.__dict__.values())

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={_brief(item)}" for name, item in self.__dict__.items())
        return f"{type(self).__name__}({parts})"


class Dense(Weight):
    """A weight that is a tensor: the frozen base's, or one that replaces it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dense(self) -> Tensor:
        return self.tensor

    @property
    def mT(self) -> Weight:
        return Dense(self.tensor.mT)


class OnBase(Weight):
    """A weight made of another weight, the base, and a change to it; by default shape, dtype and device are the base's."""

    base: Weight

    @property
    def needs_input(self) -> bool:
        return self.base.needs_input

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device


class InputDropout(OnBase):
    """`W + s·change`, whose change drops features of an operation's input in training: then it has no dense form.

    Attributes:
        scale: s.
        dropout: probability of dropping an input feature of the change.
    """

    scale: float | Tensor = 1.0
    dropout: float

    @abstractmethod
    def change(self) -> Tensor:
        """The change without its scale and dropout, of the base's shape."""

    @property
    def needs_input(self) -> bool:
        return bool(self.dropout) or self.base.needs_input

    def dense(self) -> Tensor:
        if self.dropout:
            raise AdaptError(
                f"dropout={self.dropout} acts on an operation's input, and this operation reads the weight of shape "
                f"{tuple(self.shape)} as a whole. Give this site a method without dropout, or call eval()."
            )
        return add_scaled(self.base.dense(), self.change(), self.scale)


class Transposed(OnBase):
    """The transpose of a weight whose class has none of its own."""

    def __init__(self, weight: Weight) -> None:
        self.base = weight

    @property
    def shape(self) -> torch.Size:
        *lead, rows, columns = self.base.shape
        return torch.Size([*lead, columns, rows])

    def dense(self) -> Tensor:
        return self.base.dense().mT

    @property
    def mT(self) -> Weight:
        return self.base


class Delta(OnBase):
    """`W + s·D` with a full-size change D, shape of W."""

    def __init__(self, base: Weight | Tensor, delta: Tensor, scale: float | Tensor = 1.0) -> None:
        self.base = as_weight(base)
        self.delta = delta
        self.scale = scale

    def dense(self) -> Tensor:
        return add_scaled(self.base.dense(), self.delta, self.scale)

    @property
    def mT(self) -> Weight:
        return self.replace(base=self.base.mT, delta=self.delta.mT)

    def __getitem__(self, index: Index) -> Weight:
        return self.replace(base=self.base[index], delta=self.delta[index])


def as_weight(value: Weight | Tensor) -> Weight:
    """A tensor as a `Dense` weight; a weight unchanged."""
    return value if isinstance(value, Weight) else Dense(value)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.mT + bias` for a matrix, or for a stack of matrices that broadcasts."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    y = x @ weight.mT
    return y if bias is None else y + bias


def add_scaled(base: Tensor, change: Tensor, scale: float | Tensor) -> Tensor:
    """`base + scale·change`, computed in the wider and returned in the base's element type."""
    if not isinstance(scale, Tensor):
        # Inductor (torch 2.13) loses `alpha` where it folds this into a product with its bias.
        if base.dtype == change.dtype and not torch.compiler.is_compiling():
            return torch.add(base, change, alpha=scale)
        if scale != 1.0:
            change = change * scale
    else:
        change = change * scale.to(change.dtype)
    return (base + change).to(base.dtype)


def without_padding(rows: Tensor, padding: Tensor | None) -> Tensor:
    """Looked-up rows, of which those of padding pass on no gradient."""
    return rows if padding is None else torch.where(padding.unsqueeze(-1), rows.detach(), rows)


def _brief(item: object) -> str:
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
    return repr(item)
