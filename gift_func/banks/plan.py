"""Which adapters a batch has in which order, and what is bound in the parameters' places for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..caching import LRU
from ..network.fast_path import FastPath
from ..network.frozen_base import FrozenBase
from ..network.modes import Modes
from ..network.module_tree import ModuleTree
from ..tracking.replay import Answer
from ..tracking.sample_axis import SampleAxis
from .routed_weight import RoutedWeight
from .routing import RoutedSlot
from .segments import Segments, Use

Segment = tuple[Adapter | None, int]


@dataclass(frozen=True)
class Batch:
    """The adapters of one call's samples.

    Attributes:
        adapters: each sample's; None for the base alone.
        order: the samples ordered by adapter, those without one last; None if they come so.
    """

    adapters: tuple[Adapter | None, ...]
    order: tuple[int, ...] | None

    def segments(self, ordered: bool) -> list[Segment]:
        """Neighbours of one adapter, and how many they are."""
        adapters = [self.adapters[i] for i in self.order] if ordered and self.order else self.adapters
        found: list[Segment] = []
        for adapter in adapters:
            if found and found[-1][0] is adapter:
                found[-1] = adapter, found[-1][1] + 1
            else:
                found.append((adapter, 1))
        return found


def batch_by_address(adapters: Sequence[Adapter | None]) -> Batch:
    """The adapters of one call's samples, ordered as they lie in memory, None last.

    A batch that uses all adapters of a bank then finds their tensors stacked as they lie, in whatever order it names them.
    """
    distinct = dict.fromkeys(adapter for adapter in adapters if adapter is not None)
    rank = {adapter: place for place, adapter in enumerate(sorted(distinct, key=lambda adapter: adapter.address))}
    return _ordered(adapters, [len(rank) if adapter is None else rank[adapter] for adapter in adapters])


def batch_by_name(names: Sequence[str | None], adapters: Mapping[str, Adapter]) -> Batch:
    """The adapters of one call's samples, ordered by name, None last.

    A row's last bits may depend on its place among the others, so where adapters come and go the order must not depend on
    where they lie in memory.
    """
    found = [None if name is None else adapters[name] for name in names]
    return _ordered(found, [(name is None, name or "") for name in names])


def _ordered(adapters: Sequence[Adapter | None], keys: Sequence[Any]) -> Batch:
    order = tuple(sorted(range(len(keys)), key=keys.__getitem__))
    return Batch(tuple(adapters), None if order == tuple(range(len(keys))) else order)


@dataclass(frozen=True)
class RecordedPath:
    """Record of one tracked call: which routed weights it used, in what order, where the samples are in its outputs.

    Attributes:
        uses: the routed parameters used and the dimensions of what they were applied to, in order.
        axes: where the samples lie in each tensor of the output; None for one that is not of the batch.
        answers: the numbers that were read of tensors.
    """

    uses: tuple[Use, ...]
    axes: tuple[SampleAxis | None, ...]
    answers: tuple[Answer, ...] = ()


@dataclass(eq=False)
class Plan:
    """What is bound in the network's places for one sequence of segments.

    Attributes:
        routed: the parameters that differ by segment.
        fast_path: what torch's fused kernels mean for them.
        apart: whether an adapted parameter is one of a module that runs all samples through one kernel (an LSTM).
        paths: what tracked calls recorded, by the kind of call.
        divergences: how often a call did not take its kind's recorded path.
    """

    routed: dict[str, RoutedWeight]
    fast_path: FastPath
    apart: bool
    paths: dict[object, RecordedPath] = field(default_factory=dict)
    divergences: Counter[object] = field(default_factory=Counter)
    _spare: list[dict[str, RoutedSlot]] = field(default_factory=list)

    @contextmanager
    def slots(self, segments: Segments) -> Iterator[dict[str, Tensor]]:
        """The placeholders of one call."""
        try:
            own = self._spare.pop()
        except IndexError:
            own = {name: RoutedSlot.holding(routed, segments) for name, routed in self.routed.items()}
        for slot in own.values():
            slot.segments = segments
        yield {**self.fast_path.guarded(), **own}
        if not segments.outlived:
            self._spare.append(own)  # after an error they may live on in a traceback, and are left to it


class Plans:
    """The plans of the last few sequences of adapters; safe under threads.

    Args:
        base: the frozen base.
        tree: the network.
        size: how many plans are kept.
    """

    def __init__(self, base: FrozenBase, tree: ModuleTree, size: int = 8) -> None:
        self.base = base
        self.tree = tree
        self._known: LRU[tuple[tuple[Adapter | None, ...], tuple[int, ...]], tuple[int, Plan]] = LRU(size)

    def of(self, adapters: Sequence[Adapter | None], modes: Modes) -> Plan:
        """The plan for segments of these adapters."""
        key = tuple(adapters), tuple(adapter.generation for adapter in adapters if adapter is not None)
        epoch = self.base.watch()
        known = self._known.get(key)
        if known is not None and known[0] == epoch:
            return known[1]
        weights = [{} if adapter is None else adapter.weights(modes) for adapter in adapters]
        names = dict.fromkeys(name for found in weights for name in found)
        base, tree = self.base.weights, self.tree
        routed = {name: RoutedWeight([found.get(name, base[name]) for found in weights], name) for name in names}
        recurrent = any(isinstance(tree.places[name][0][0], (nn.RNNBase, nn.RNNCellBase)) for name in names)
        plan = Plan(routed, FastPath(self.base, tree, list(names)), recurrent)
        if all(adapter is None or adapter.keeps_weights(modes) for adapter in adapters):
            self._known.put(key, (epoch, plan))
        return plan
