"""The network of a store, which keeps no reference to the adapters that a call used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ..adapter import Adapter
from ..banks.mixed_batch import MixedBatchRunner
from ..banks.plan import Plan, Plans, RecordedPath
from ..caching import LRU
from ..network.fast_path import FastPath
from ..network.frozen_base import FrozenBase
from ..network.module_tree import Modes, ModuleTree

PATHS = 256
"""How many recorded paths are cached, and for how many kinds of adapters."""


class ShortLivedPlans(Plans):
    """Plans that are made for each call, since a plan refers to its adapters. Recorded paths do not, and are cached."""

    def __init__(self, base: FrozenBase, tree: ModuleTree) -> None:
        super().__init__(base, tree, size=0)
        self._paths: LRU[object, dict[object, RecordedPath]] = LRU(PATHS)

    def of(self, adapters: Sequence[Adapter | None], modes: Modes) -> Plan:
        """The plan for these adapters, with the recorded paths of calls with equal kinds of adapters in the same order."""
        plan = super().of(adapters, modes)
        kinds = frozenset((name, type(member)) for name, routed in plan.routed.items() for member in routed.members)
        plan.paths = self._paths.setdefault((tuple(plan.routed), kinds), plan.paths)
        if len(plan.paths) > PATHS:
            plan.paths.clear()
        return plan


class StoreRunner(MixedBatchRunner):
    """A network in eval mode for adapters that come and go: it refers to none of them longer than their call.

    Args:
        base: the frozen base.
    """

    max_models: ClassVar[int] = 8

    def __init__(self, base: FrozenBase) -> None:
        super().__init__(base, False)
        self.plans: Plans = ShortLivedPlans(base, self.pool.tree)

    def run_apart(self, adapter: Adapter, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the network on samples of one adapter; only an adapter with modules or buffers has a model for it."""
        if adapter.why_apart:
            return super().run_apart(adapter, method, args, kwargs)
        self.base.watch()
        weights = adapter.weights(self.modes)
        bindings = FastPath(self.base, self.pool.tree, list(weights)).bindings(weights, adapter.tensors.values())
        return self.pool.run(method, args, kwargs, bindings, {}, private_buffers=True)
