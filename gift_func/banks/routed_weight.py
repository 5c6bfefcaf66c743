"""A weight that differs by sample, and the placeholder that stands for it in one call."""

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


class Routed(Weight):
    """A weight for each run of a batch; as a whole it has a shape, and no value.

    Args:
        members: one for each run.
        name: of the parameter, for errors.
    """

    def __init__(self, members: Sequence[Weight], name: str) -> None:
        self.members = tuple(members)
        self.name = name
        self._bundles: dict[int, StackedWeights | Literal[False]] = {}
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

    def bundle(self, runs: int) -> StackedWeights | None:
        """The first runs' weights as one of stacked tensors, if they are alike."""
        kept = self._bundles.get(runs)
        if kept is None:
            kept = self._bundles[runs] = StackedWeights.of(self.members[:runs]) or False
        return kept or None

    def loops(self, runs: int) -> None:
        """Remember that torch has no rule for what is done with the bundle."""
        self._bundles[runs] = False

    def low_rank(self, transposed: bool = False) -> SegmentedLowRank | None:
        """The runs' factors in one piece, if all that have any are low-rank changes of one matrix.

        Args:
            transposed: of the weight's transpose.
        """
        kept = self._low_rank.get(transposed)
        if kept is None or (isinstance(kept, SegmentedLowRank) and not kept.is_good):
            kept = self._low_rank[transposed] = SegmentedLowRank.of(self.members, transposed) or False
        return kept or None


class Placeholder(Slot):
    """What stands in a routed parameter's place in one call. A subclass says what functions do with it.

    Attributes:
        mix: the call's runs.
        route: what a torch function, called with these arguments, does with the placeholders among them.
    """

    weight: Routed
    mix: Segments
    route: ClassVar[Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]]

    @classmethod
    def holding(cls, weight: Routed, mix: Segments) -> Self:
        """A new placeholder."""
        plain = Slot.of(weight)
        made = plain.as_subclass(cls)
        made.__dict__.update(plain.__dict__)
        made.mix = mix
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


def member(leaf: Any, run: int) -> Any:
    """What stands for a routed parameter in one run; anything else as it is."""
    if not isinstance(leaf, Placeholder):
        return leaf
    weight = leaf.weight.members[run]
    return weight.tensor if isinstance(weight, Dense) else Slot.of(weight)


def one_of_equals(leaf: Any, size: int, count: int) -> Any:
    """A tensor that was expanded to the batch's size, cut to `count` of its equal rows; anything else as it is."""
    if isinstance(leaf, Slot) or not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return leaf[:count] if leaf.shape[0] == size and leaf.stride(0) == 0 else leaf
