"""Weights of several adapters as one weight of stacked tensors, so that `torch.vmap` runs a function of all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..weights import Slot, Weight
from .contiguous import stacked


class StackedWeights:
    """Weights that one method makes of one base, alike but for their tensors.

    Args:
        members: the weights.

    Attributes:
        dims: for each tensor that they hold 0 if it is stacked, None if it is one and the same in all.
    """

    def __init__(self, members: Sequence[Weight]) -> None:
        self._members = tuple(members)
        every = [member.leaves() for member in members]
        self.dims = [None if all(leaf is column[0] for leaf in column) else 0 for column in zip(*every, strict=True)]

    def tensors(self) -> list[Tensor]:
        """The tensors, stacked where they differ: without a copy where they lie so in memory."""
        columns = list(zip(*(member.leaves() for member in self._members), strict=True))
        return [column[0] if dim is None else stacked(column) for column, dim in zip(columns, self.dims, strict=True)]

    def slot(self, shares: Sequence[Tensor]) -> Slot:
        """The placeholder of one member, by its share of the tensors."""
        rest = iter(shares)
        return Slot.of(self._members[0].map(lambda _: next(rest)))

    @staticmethod
    def of(members: Sequence[Weight]) -> StackedWeights | None:
        """The members' stack; None where their tensors differ in number, shape or type."""
        kinds = [[(leaf.shape, leaf.dtype, leaf.device) for leaf in member.leaves()] for member in members]
        try:
            forms = {_form(member) for member in members}
        except TypeError:  # a plain value that cannot be hashed, so that equal ones cannot be told
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
        func: of the leaves, some of them replaced.
        places: place of a leaf -> a tensor and the axis of it that is mapped.
        stacks: place of a leaf -> the weights whose placeholders stand there.
        leaves: all of them.

    Returns:
        What `func` returns, its tensors with the members in front.

    Raises:
        RuntimeError: if torch has no batching rule for what the function does.
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
    """What a weight is but for its tensors: its class, those inside it, and its plain values."""
    parts: list[Any] = [type(weight)]
    for name, item in weight.__dict__.items():
        if isinstance(item, Weight):
            parts.append((name, _form(item)))
        elif not isinstance(item, Tensor):
            parts.append((name, _called(item)))
    return tuple(parts)


def _called(item: Any) -> Any:
    """A value to compare by: of a function what it is made of, of a bound one whose it is."""
    if not callable(item):
        return item
    owner: Callable[..., Any] | None = getattr(item, "__self__", None)
    closure = tuple(cell.cell_contents for cell in getattr(item, "__closure__", None) or ())
    arguments = (getattr(item, "func", None), getattr(item, "args", ()), tuple(sorted(getattr(item, "keywords", {}).items())))
    return getattr(item, "__code__", None) or type(item), owner, closure, arguments
