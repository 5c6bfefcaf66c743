"""The adapters of a batch and their order, and the tensors to bind for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..caching import LRU
from ..network.fast_path import FastPath
from ..network.frozen_base import FrozenBase
from ..network.module_tree import Modes, ModuleTree
from ..tracking.replay import Answer
from ..tracking.sample_axis import SampleAxis
from ..weights import Weight
from .routed_weight import RoutedWeight
from .routing import RoutedSlot
from .segments import Segments, Use

Segment = tuple[Adapter | None, int]


@dataclass(frozen=True)
class Batch:
    """The adapters of one call's samples.

    Attributes:
        adapters: the adapter of each sample; None for the base alone.
        order: the indices of the samples sorted by adapter, those without one last; None if they are sorted.
    """

    adapters: tuple[Adapter | None, ...]
    order: tuple[int, ...] | None

    def segments(self, ordered: bool) -> list[Segment]:
        """The adapter of each segment, and its number of samples."""
        adapters = [self.adapters[i] for i in self.order] if ordered and self.order else self.adapters
        found: list[Segment] = []
        for adapter in adapters:
            if found and found[-1][0] is adapter:
                found[-1] = adapter, found[-1][1] + 1
            else:
                found.append((adapter, 1))
        return found


def batch_by_address(adapters: Sequence[Adapter | None]) -> Batch:
    """The adapters of one call's samples, sorted by memory address, None last.

    If a batch uses all adapters of a bank, their tensors then are one stack in memory, and need no copy.
    """
    distinct = dict.fromkeys(adapter for adapter in adapters if adapter is not None)
    rank = {adapter: place for place, adapter in enumerate(sorted(distinct, key=lambda adapter: adapter.address))}
    return _ordered(adapters, [len(rank) if adapter is None else rank[adapter] for adapter in adapters])


def batch_by_name(names: Sequence[str | None], adapters: Mapping[str, Adapter]) -> Batch:
    """The adapters of one call's samples, sorted by name, None last.

    The last bits of a sample's result may depend on the order, so where adapters are loaded and dropped it must not depend
    on memory addresses.
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
        axes: the sample axis of each tensor of the output; None for one that does not depend on the batch.
        answers: the numbers that were read from tensors.
    """

    uses: tuple[Use, ...]
    axes: tuple[SampleAxis | None, ...]
    answers: tuple[Answer, ...] = ()


@dataclass(eq=False)
class Plan:
    """The tensors to bind for one sequence of segments.

    Attributes:
        routed: the parameters that differ by segment.
        fast_path: the tensors to bind if torch's fused kernels may run.
        apart: whether an adapted parameter is of a module that runs all samples through one kernel (an LSTM).
        paths: the recorded path of each kind of call.
        divergences: how many calls of each kind diverged from the recorded path.
    """

    routed: dict[str, RoutedWeight]
    fast_path: FastPath
    apart: bool
    paths: dict[object, RecordedPath] = field(default_factory=dict)
    divergences: Counter[object] = field(default_factory=Counter)
    _spare: list[dict[str, RoutedSlot]] = field(default_factory=list)

    @contextmanager
    def slots(self, segments: Segments) -> Iterator[dict[str, Tensor]]:
        """The slots of one call."""
        try:
            slots = self._spare.pop()
        except IndexError:
            slots = {name: RoutedSlot.for_call(routed, segments) for name, routed in self.routed.items()}
        for slot in slots.values():
            slot.segments = segments
        yield {**self.fast_path.guarded(), **slots}
        if not segments.outlived:
            self._spare.append(slots)  # not after an error, whose traceback may refer to them


class Plans:
    """A cache of the plans of the last sequences of adapters; safe under threads.

    Args:
        base: the frozen base.
        tree: the network.
        size: how many plans are cached.
    """

    def __init__(self, base: FrozenBase, tree: ModuleTree, size: int = 8) -> None:
        self.base = base
        self.tree = tree
        self._known: LRU[tuple[Adapter | None, ...], tuple[list[dict[str, Weight] | None], Plan]] = LRU(size)

    def of(self, adapters: Sequence[Adapter | None], modes: Modes) -> Plan:
        """The plan for segments of these adapters, in the order given."""
        self.base.watch()
        key, weights = tuple(adapters), [None if adapter is None else adapter.weights(modes) for adapter in adapters]
        known = self._known.get(key)
        if known is not None and all(map(is_, known[0], weights)):
            return known[1]
        names = dict.fromkeys(name for found in weights for name in found or ())
        base, tree = self.base.weights, self.tree
        routed = {name: RoutedWeight([(found or base).get(name, base[name]) for found in weights], name) for name in names}
        recurrent = any(isinstance(tree.places[name][0][0], (nn.RNNBase, nn.RNNCellBase)) for name in names)
        plan = Plan(routed, FastPath(self.base, tree, list(names)), recurrent)
        if all(adapter is None or adapter.has_cached_weights(modes) for adapter in adapters):
            self._known.put(key, (weights, plan))
        return plan
