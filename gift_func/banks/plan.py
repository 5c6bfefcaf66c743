"""What a batch asks of the network: its runs of adapters, and what then stands in the parameters' places."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..network.fast_path import fused_names, guards
from ..network.frozen_base import FrozenBase
from ..network.modes import Modes
from ..network.module_tree import ModuleTree
from ..tracking.replay import Answer
from ..tracking.sample_axis import SampleAxis
from ..weights import Slot
from .entry import Adapter
from .routed_weight import Routed
from .routing import RoutedSlot
from .segments import Segments, Use

Run = tuple[Adapter | None, int]


@dataclass(frozen=True)
class Batch:
    """The adapters of one call's samples.

    Attributes:
        entries: each sample's; None for the base alone.
        order: the samples ordered by adapter, those without one last; None if they come so.
    """

    entries: tuple[Adapter | None, ...]
    order: tuple[int, ...] | None

    def runs(self, ordered: bool) -> list[Run]:
        """Neighbours of one adapter, and how many they are."""
        entries = [self.entries[i] for i in self.order] if ordered and self.order else self.entries
        found: list[Run] = []
        for entry in entries:
            if found and found[-1][0] is entry:
                found[-1] = entry, found[-1][1] + 1
            else:
                found.append((entry, 1))
        return found


def arrange(entries: Sequence[Adapter | None]) -> Batch:
    """The adapters of one call's samples, and the order by adapter: as they lie in memory, None last.

    A batch that uses all adapters of a bank then finds their tensors stacked as they lie, in whatever order it names them.
    """
    distinct = dict.fromkeys(entry for entry in entries if entry is not None)
    rank = {entry: place for place, entry in enumerate(sorted(distinct, key=lambda entry: entry.address))}
    keys = [len(rank) if entry is None else rank[entry] for entry in entries]
    order = tuple(sorted(range(len(keys)), key=keys.__getitem__))
    return Batch(tuple(entries), None if order == tuple(range(len(keys))) else order)


@dataclass(frozen=True)
class RecordedPath:
    """What a call of one kind met, from the batch's rows in its input to those in its output.

    Attributes:
        uses: the routed parameters met and the dimensions of what met them, in order.
        rows: where the samples lie in each tensor of the output; None for one that is not of the batch.
        answers: the numbers that were read of tensors.
    """

    uses: tuple[Use, ...]
    rows: tuple[SampleAxis | None, ...]
    answers: tuple[Answer, ...] = ()


@dataclass(eq=False)
class Plan:
    """What stands in the network's places for one sequence of runs.

    Attributes:
        routed: the parameters that differ by run.
        guarded: parameters that must be slots too (`fused.guards`), by their own weights.
        fused: whether a fused kernel would read an adapted parameter.
        apart: whether an adapted parameter is one of a module that runs all samples through one kernel (an LSTM).
        ways: what calls met that were followed, by their kind.
        strays: how often a call did not go its kind's remembered way.
    """

    routed: dict[str, Routed]
    guarded: dict[str, Tensor]
    fused: bool
    apart: bool
    ways: dict[object, RecordedPath] = field(default_factory=dict)
    strays: Counter[object] = field(default_factory=Counter)
    _spare: list[dict[str, RoutedSlot]] = field(default_factory=list)

    @contextmanager
    def slots(self, mix: Segments) -> Iterator[dict[str, Tensor]]:
        """The placeholders of one call."""
        try:
            own = self._spare.pop()
        except IndexError:
            own = {name: RoutedSlot.holding(routed, mix) for name, routed in self.routed.items()}
        for slot in own.values():
            slot.mix = mix
        yield {**self.guarded, **own}
        if not mix.outlived:
            self._spare.append(own)  # after an error they may live on in a traceback, and are left to it


class Plans:
    """The plans of the last few sequences of adapters; safe under threads.

    Args:
        base: the frozen base.
        structure: the network's private structure.
    """

    SIZE = 8

    def __init__(self, base: FrozenBase, structure: ModuleTree) -> None:
        self.base = base
        self.structure = structure
        self._known: OrderedDict[tuple[Adapter | None, ...], tuple[int, Plan]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, entries: Sequence[Adapter | None], modes: Modes) -> Plan:
        """The plan for runs of these adapters."""
        key = tuple(entries)
        epoch = self.base.watch()
        with self._lock:
            known = self._known.get(key)
            if known is not None and known[0] == epoch:
                self._known.move_to_end(key)
                return known[1]
        weights = [{} if entry is None else entry.weights(modes) for entry in entries]
        names = dict.fromkeys(name for found in weights for name in found)
        base, structure = self.base.weights, self.structure
        routed = {name: Routed([found.get(name, base[name]) for found in weights], name) for name in names}
        guarded: dict[str, Tensor] = {name: Slot.of(base[name]) for name in guards(structure, names)}
        recurrent = any(isinstance(structure.places[name][0][0], (nn.RNNBase, nn.RNNCellBase)) for name in names)
        plan = Plan(routed, guarded, bool(fused_names(structure, names)), recurrent)
        if all(entry is None or entry.rests(modes) for entry in entries):
            with self._lock:
                self._known[key] = epoch, plan
                while len(self._known) > self.SIZE:
                    self._known.popitem(last=False)
        return plan
