"""The network of a store, which keeps nothing of an adapter that a call has used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..adapted_model import AdaptedModel
from ..banks.entry import Adapter
from ..banks.mixed_batch import MixedBatchRunner
from ..banks.plan import Batch, Plan, Plans, RecordedPath
from ..network.fast_path import fused_names, guards, runs_fused
from ..network.frozen_base import FrozenBase
from ..network.modes import Modes
from ..network.module_tree import ModuleTree
from ..weights import Slot, Weight


class ShortLivedPlans(Plans):
    """Plans that are made for each call, since a plan holds its adapters; what calls met does not, and is kept."""

    SIZE = 0
    WAYS = 256

    def __init__(self, base: FrozenBase, structure: ModuleTree) -> None:
        super().__init__(base, structure)
        self._ways: OrderedDict[object, dict[object, RecordedPath]] = OrderedDict()
        self._ways_lock = threading.Lock()

    def of(self, entries: Sequence[Adapter | None], modes: Modes) -> Plan:
        """The plan for runs of these adapters, with what calls met whose adapters are of the same kinds in the same places."""
        plan = super().of(entries, modes)
        kinds = frozenset((name, type(member)) for name, routed in plan.routed.items() for member in routed.members)
        with self._ways_lock:
            plan.ways = self._ways.setdefault((tuple(plan.routed), kinds), plan.ways)
            if len(plan.ways) > self.WAYS:
                plan.ways.clear()
            while len(self._ways) > self.WAYS:
                self._ways.popitem(last=False)
        return plan


class StoreRunner(MixedBatchRunner):
    """A network in eval mode for adapters that come and go: it holds none of them longer than its call, nor stacks of them.

    An adapter alone in its call is bound to a copy of the network that is lent to the call, so none is made for it. Only
    one that brings modules or buffers has a model of its own, which goes with it.

    Args:
        base: the frozen base.
    """

    MODELS = 8

    def __init__(self, base: FrozenBase) -> None:
        super().__init__(base, False)
        self.plans: Plans = ShortLivedPlans(base, self.body.structure)
        self._models: WeakKeyDictionary[Adapter, AdaptedModel] = WeakKeyDictionary()
        self._models_lock = threading.Lock()

    def alone(self, entry: Adapter) -> Callable[..., Any]:
        """What runs one adapter's samples by themselves."""
        if not entry.apart:
            return Alone(self, entry)
        with self._models_lock:
            found = self._models.get(entry)
        if found is None:
            made = self.model(entry)
            with self._models_lock:
                found = self._models.setdefault(entry, made)
                while len(self._models) > self.MODELS:
                    del self._models[next(iter(self._models))]
        return found


class Alone:
    """One adapter on a copy of the network that is lent to each call.

    Args:
        network: whose copies are lent.
        entry: the adapter.
    """

    def __init__(self, network: MixedBatchRunner, entry: Adapter) -> None:
        self._network = network
        self._entry = entry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        getattr(self._network.body.module, name)  # an unknown name says so now
        return partial(self._run, name)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        network, entry = self._network, self._entry
        network.base.watch()
        weights = entry.weights(network.modes)
        slots = self._slots(weights)
        with network.body.checkout(slots, {}, private_buffers=True) as (twin, call):
            return call.returns(getattr(twin.structure.module, method)(*args, **kwargs))

    def _slots(self, weights: dict[str, Weight]) -> dict[str, Tensor]:
        base, structure = self._network.base, self._network.body.structure
        names = [*weights, *(name for name in base.slots if name not in weights)]
        slots: dict[str, Tensor] = {name: Slot.of(weight) for name, weight in weights.items()}
        guarded = guards(structure, names)
        for name in guarded:
            slots.setdefault(name, Slot.of(base.weights[name]))
        fused = fused_names(structure, names)
        if fused and runs_fused(structure, self._entry.tensors.values()):
            for name in (*fused, *guarded):
                slots[name] = (weights.get(name) or base.weights[name]).dense()
        return slots


def arrange(names: Sequence[str | None], entries: Mapping[str, Adapter]) -> Batch:
    """The adapters of one call's samples, and the order by adapter: by name, None last.

    A row's last bits may depend on its place among the others, so the order must not: an adapter may lie elsewhere in
    memory each time it is read.
    """
    keys = [(name is None, name or "") for name in names]
    order = tuple(sorted(range(len(keys)), key=keys.__getitem__))
    found = tuple(None if name is None else entries[name] for name in names)
    return Batch(found, None if order == tuple(range(len(keys))) else order)
