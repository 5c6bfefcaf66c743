"""The network of a store, which keeps nothing of an adapter that a call has used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ..adapted_model import AdaptedModel
from ..adapter import Adapter
from ..banks.mixed_batch import MixedBatchRunner
from ..banks.plan import Plan, Plans, RecordedPath
from ..caching import LRU
from ..network.fast_path import FastPath
from ..network.frozen_base import FrozenBase
from ..network.modes import Modes
from ..network.module_tree import ModuleTree

MODELS = 8
"""How many adapters that bring modules or buffers have models at a time."""

PATHS = 256
"""How many recorded paths are kept, and for how many kinds of adapters."""


class ShortLivedPlans(Plans):
    """Plans that are made for each call, since a plan holds its adapters; recorded paths do not, and are kept."""

    def __init__(self, base: FrozenBase, tree: ModuleTree) -> None:
        super().__init__(base, tree, size=0)
        self._paths: LRU[object, dict[object, RecordedPath]] = LRU(PATHS)

    def of(self, adapters: Sequence[Adapter | None], modes: Modes) -> Plan:
        """The plan for these adapters, with the paths of calls whose adapters were of the same kinds in the same places."""
        plan = super().of(adapters, modes)
        kinds = frozenset((name, type(member)) for name, routed in plan.routed.items() for member in routed.members)
        plan.paths = self._paths.setdefault((tuple(plan.routed), kinds), plan.paths)
        if len(plan.paths) > PATHS:
            plan.paths.clear()
        return plan


class StoreRunner(MixedBatchRunner):
    """A network in eval mode for adapters that come and go: it keeps none of them longer than its call, nor stacks of them.

    An adapter alone in its call is bound to a copy of the network that is lent to the call, so none is made for it. Only
    one that brings modules or buffers has a model of its own, which goes with it.

    Args:
        base: the frozen base.
    """

    def __init__(self, base: FrozenBase) -> None:
        super().__init__(base, False)
        self.plans: Plans = ShortLivedPlans(base, self.pool.tree)
        self._models: WeakKeyDictionary[Adapter, AdaptedModel] = WeakKeyDictionary()
        self._models_lock = threading.Lock()

    def alone(self, adapter: Adapter) -> Callable[..., Any]:
        """What runs one adapter's samples by themselves."""
        if not adapter.why_apart:
            return OneAdapter(self, adapter)
        with self._models_lock:
            found = self._models.get(adapter)
        if found is None:
            made = self.model(adapter)
            with self._models_lock:
                found = self._models.setdefault(adapter, made)
                while len(self._models) > MODELS:
                    del self._models[next(iter(self._models))]
        return found


class OneAdapter:
    """One adapter on a copy of the network that is lent to each call.

    Args:
        runner: whose copies are lent.
        adapter: the adapter.
    """

    def __init__(self, runner: MixedBatchRunner, adapter: Adapter) -> None:
        self._runner = runner
        self._adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        getattr(self._runner.pool.module, name)  # an unknown name says so now
        return partial(self._run, name)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        runner, adapter = self._runner, self._adapter
        runner.base.watch()
        weights = adapter.weights(runner.modes)
        fast_path = FastPath(runner.base, runner.pool.tree, list(weights))
        bindings = fast_path.bindings(weights, adapter.tensors.values())
        with runner.pool.checkout(bindings, {}, private_buffers=True) as (copy, call):
            return call.returns(getattr(copy.tree.module, method)(*args, **kwargs))
