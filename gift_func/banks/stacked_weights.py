"""Stacks the weights of several adapters, so that `torch.vmap` runs a function of all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..weights import Slot, Weight
from .contiguous import stacked


class StackedWeights:
    """Weights that differ only in their tensors.

    Args:
        members: the weights.

    Attributes:
        dims: for each of their tensors 0 if it is stacked, None if all weights share it.
    """

    def __init__(self, members: Sequence[Weight]) -> None:
        self._members = tuple(members)
        every = [member.leaves() for member in members]
        self.dims = [None if all(leaf is column[0] for leaf in column) else 0 for column in zip(*every, strict=True)]

    def tensors(self) -> list[Tensor]:
        """The tensors, stacked where they differ; without a copy if they are one stack in memory."""
        columns = list(zip(*(member.leaves() for member in self._members), strict=True))
        return [column[0] if dim is None else stacked(column) for column, dim in zip(columns, self.dims, strict=True)]

    def slot(self, shares: Sequence[Tensor]) -> Slot:
        """The slot of one member, from its share of the tensors."""
        remaining = iter(shares)
        return Slot.of(self._members[0].map(lambda _: next(remaining)))

    @staticmethod
    def of(members: Sequence[Weight]) -> StackedWeights | None:
        """The weights' stack; None if they differ in more than their tensors, or their tensors in number, shape or dtype."""
        kinds = [[(leaf.shape, leaf.dtype, leaf.device) for leaf in member.leaves()] for member in members]
        try:
            forms = {_form(member) for member in members}
        except TypeError:  # an attribute that cannot be hashed, and so not be compared here
            return None
        return StackedWeights(members) if len(forms) == 1 and all(kind == kinds[0] for kind in kinds) else None


def run_at_once(
    func: Callable[[Sequence[Any]], Any],
    places: dict[int, tuple[Tensor, int]],
    stacks: dict[int, StackedWeights],
    leaves: Sequence[Any],
) -> Any:
    """A function under `torch.vmap` over the members of stacks.

    Args:
        func: the function; it is given the leaves.
        places: place of a leaf -> a tensor for it, and the axis that is mapped.
        stacks: place of a leaf -> the weights for it.
        leaves: the leaves for the other places.

    Returns:
        The function's output, its tensors with the members as first axis.

    Raises:
        RuntimeError: if torch has no batching rule for an operation.
    """
    tensors_of = {place: stack.tensors() for place, stack in stacks.items()}

    def one(parts: dict[int, Tensor], shares: dict[int, list[Tensor]]) -> Any:
        own = list(leaves)
        for place, part in parts.items():
            own[place] = part
        for place, stack in stacks.items():
            own[place] = stack.slot(shares[place])
        return func(own)

    dims = ({place: axis for place, (_, axis) in places.items()}, {place: stack.dims for place, stack in stacks.items()})
    tensors = {place: tensor for place, (tensor, _) in places.items()}
    return torch.vmap(one, in_dims=dims, randomness="different")(tensors, tensors_of)


def _form(weight: Weight) -> tuple[Any, ...]:
    """A weight without its tensors, to compare by: its class and other attributes, and those of the weights inside it."""
    parts: list[Any] = [type(weight)]
    for name, item in weight.__dict__.items():
        if isinstance(item, Weight):
            parts.append((name, _form(item)))
        elif not isinstance(item, Tensor):
            parts.append((name, _comparable(item)))
    return tuple(parts)


def _comparable(item: Any) -> Any:
    """An attribute to compare by: a function's code, closure and arguments, and the object of a bound method."""
    if not callable(item):
        return item
    owner: Callable[..., Any] | None = getattr(item, "__self__", None)
    closure = tuple(cell.cell_contents for cell in getattr(item, "__closure__", None) or ())
    arguments = (getattr(item, "func", None), getattr(item, "args", ()), tuple(sorted(getattr(item, "keywords", {}).items())))
    return getattr(item, "__code__", None) or type(item), owner, closure, arguments
