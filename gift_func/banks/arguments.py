"""The arguments of one call of a network on a batch: which of them are of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..tracking.sample_axis import SampleAxis, tag
from .samples import doubtful, is_same, kind_of, leads, shared


@dataclass(frozen=True)
class Arguments:
    """Arguments as a tree's leaves.

    Attributes:
        leaves: of the tree `(args, kwargs)`.
        spec: the tree.
        inputs: the places of the tensors that have a row for each sample.
        is_plain: whether no other tensor might have one.
        kind: what tells calls apart that may go different ways through the network; None where that cannot be told.
    """

    leaves: Sequence[Any]
    spec: TreeSpec
    inputs: frozenset[int]
    is_plain: bool
    kind: object

    @staticmethod
    def of(leaves: Sequence[Any], spec: TreeSpec, size: int) -> Arguments:
        """The arguments of a batch of so many samples."""
        alike = shared(leaves, size)
        outside = doubtful(leaves, size) if alike is None else alike
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = frozenset(place for place, leaf in tensors if leads(leaf, size) and place not in outside)
        return Arguments(leaves, spec, inputs, alike is not None, kind_of(leaves, spec))

    def allow(self, order: Sequence[int] | None) -> bool:
        """Whether the samples may be given in another order, if there is one, and their results put back."""
        return order is not None and self.kind is not None and (self.is_plain or is_same(self.leaves, order))

    def ordered(self, order: Tensor) -> Arguments:
        """The arguments with the samples in another order."""
        return replace(self, leaves=self._with(lambda leaf: leaf.index_select(0, order.to(leaf.device))))

    def whole(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)`."""
        made: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(list(self.leaves), self.spec)
        return made

    def tagged(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)`, their samples marked for following."""
        return replace(self, leaves=self._with(lambda leaf: tag(leaf, SampleAxis(0, 1)))).whole()

    def _with(self, function: Callable[[Tensor], Tensor]) -> list[Any]:
        return [function(leaf) if place in self.inputs else leaf for place, leaf in enumerate(self.leaves)]
