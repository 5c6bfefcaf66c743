"""A weight for each segment of a batch, and its slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import AdaptError
from ..weights import Dense, Slot, Weight
from ..weights.names import METADATA
from .segmented_low_rank import SegmentedLowRank
from .segments import Segments
from .stacked_weights import StackedWeights


class RoutedWeight(Weight):
    """A weight for each segment of a batch. It has a shape, but no single dense value.

    Args:
        members: the segments' weights.
        name: the parameter's name, for errors.
    """

    def __init__(self, members: Sequence[Weight], name: str) -> None:
        self.members = tuple(members)
        self.name = name
        self._stacks: dict[int, StackedWeights | Literal[False]] = {}
        self._low_rank: dict[bool, SegmentedLowRank | Literal[False]] = {}

    @property
    def shape(self) -> torch.Size:
        return self.members[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].dtype

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def dense(self) -> Tensor:
        raise AdaptError(f"{self.name!r} differs by sample in this batch, so it has no single value")

    @property
    def requires_grad(self) -> bool:
        return any(member.requires_grad for member in self.members)

    def stacked(self, segments: int) -> StackedWeights | None:
        """The first segments' weights as one weight of stacked tensors; None if they differ in kind."""
        known = self._stacks.get(segments)
        if known is None:
            known = self._stacks[segments] = StackedWeights.of(self.members[:segments]) or False
        return known or None

    def cannot_stack(self, segments: int) -> None:
        """Do not stack so many segments again, since torch has no batching rule for the function."""
        self._stacks[segments] = False

    def low_rank(self, transposed: bool = False) -> SegmentedLowRank | None:
        """The segments' stacked factors, if all are the base's matrix or low-rank changes of it.

        Args:
            transposed: whether for the weight's transpose.
        """
        known = self._low_rank.get(transposed)
        if known is None or (isinstance(known, SegmentedLowRank) and not known.is_good):
            known = self._low_rank[transposed] = SegmentedLowRank.of(self.members, transposed) or False
        return known or None


class Placeholder(Slot):
    """The slot of a routed weight in one call, without the rules for torch functions.

    Attributes:
        segments: the call's segments.
        route: runs a torch function whose arguments have such slots.
    """

    weight: RoutedWeight
    segments: Segments
    route: ClassVar[Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]]

    @classmethod
    def for_call(cls, weight: RoutedWeight, segments: Segments) -> Self:
        """A new slot."""
        plain = Slot.of(weight)
        made = plain.as_subclass(cls)
        made.__dict__.update(plain.__dict__)
        made.segments = segments
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.route(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"{type(self).__name__}({self.weight.name!r})"


def member(leaf: Any, segment: int) -> Any:
    """One segment's tensor of a routed weight; anything else as it is."""
    if not isinstance(leaf, Placeholder):
        return leaf
    weight = leaf.weight.members[segment]
    return weight.tensor if isinstance(weight, Dense) else Slot.of(weight)


def one_of_equals(leaf: Any, size: int, count: int) -> Any:
    """A tensor that was expanded along its first axis to the batch's size, cut to `count`; anything else as it is."""
    if isinstance(leaf, Slot) or not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return leaf[:count] if leaf.shape[0] == size and leaf.stride(0) == 0 else leaf
