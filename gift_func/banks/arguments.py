"""The arguments of one call of a network on a batch, and which of them have a sample axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..tracking.sample_axis import SampleAxis, tag
from .samples import doubtful, is_same, kind_of, leads


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call as the leaves of a tree.

    Attributes:
        leaves: the leaves of `(args, kwargs)`.
        spec: the tree.
        inputs: the places of the tensors whose first axis is the batch.
        is_plain: whether this is certain.
        kind: differs for calls that may differ in the functions that the network runs; None where this is unknown.
    """

    leaves: Sequence[Any]
    spec: TreeSpec
    inputs: frozenset[int]
    is_plain: bool
    kind: object

    @staticmethod
    def of(leaves: Sequence[Any], spec: TreeSpec, size: int) -> Arguments:
        """The arguments of a batch of so many samples."""
        unclear = doubtful(leaves, size)
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = frozenset(place for place, leaf in tensors if leads(leaf, size) and place not in unclear)
        return Arguments(leaves, spec, inputs, not unclear, kind_of(leaves, spec))

    def allow(self, order: Sequence[int] | None) -> bool:
        """Whether the samples may be put in another order, if there is one."""
        return order is not None and self.kind is not None and (self.is_plain or is_same(self.leaves, order))

    def ordered(self, order: Tensor) -> Arguments:
        """The arguments with the samples in another order."""
        return replace(self, leaves=self._with(lambda leaf: leaf.index_select(0, order.to(leaf.device))))

    def whole(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)`."""
        return tree_unflatten(list(self.leaves), self.spec)  # type: ignore[no-any-return]

    def tagged(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)`, with tagged sample axes."""
        return replace(self, leaves=self._with(lambda leaf: tag(leaf, SampleAxis(0, 1)))).whole()

    def _with(self, function: Callable[[Tensor], Tensor]) -> list[Any]:
        return [function(leaf) if place in self.inputs else leaf for place, leaf in enumerate(self.leaves)]
