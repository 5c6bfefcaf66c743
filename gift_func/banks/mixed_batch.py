"""Runs a network on a batch whose samples have different adapters."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from types import GeneratorType
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .._torch import lasting_outside
from ..adapted_model import AdaptedModel
from ..adapter import Adapter
from ..caching import LRU
from ..errors import AdaptError
from ..network.base_view import BaseView
from ..network.copy_pool import CopyPool
from ..network.fast_path import FastPath
from ..network.frozen_base import FrozenBase
from ..network.module_tree import Modes, ModuleTree, clone
from ..tracking.replay import DivergedError, ReplayReads
from ..tracking.sample_axis import SampleAxis, TrackSamples, tag
from .arguments import Arguments
from .compiled import CompiledBank
from .generation import stepped, stepping
from .plan import Batch, Plan, Plans, RecordedPath
from .routing import ApartError
from .samples import check_size, is_mixed, is_opaque, leads, merged, output_axis, put_back, shared
from .segments import Segments

Output = tuple[list[Any], TreeSpec, Sequence[SampleAxis | None]]
"""The leaves of an output, its tree, and the sample axis of each leaf."""

MAX_DIVERGENCES = 3
"""After this many calls of a kind that diverged from the recorded path, calls of that kind are always tracked."""


class MixedBatchRunner:
    """Runs batches whose samples have different adapters, on private copies of the network that all adapters share.

    Args:
        base: the frozen base.
        modes: the modules in training mode, or one mode for all.

    Attributes:
        pool: the private copies.
        modes: the modules in training mode.
        training: whether the network is in training mode.
        plans: the tensors to bind, by sequences of adapters.
        statistics: the name of a module whose output for a sample depends on the other samples (BatchNorm in training), so
            that adapters cannot share a pass; None if there is none.
    """

    max_models: ClassVar[int] = 32
    """For how many adapters models are cached."""

    def __init__(self, base: FrozenBase, modes: Modes | bool) -> None:
        self.base = base
        tree = base.tree.copy(clone)
        tree.set_modes(modes)
        self.modes = tree.modes()
        self.training = "" in self.modes
        self._one_mode = modes if isinstance(modes, bool) else None
        if base.has_plain_modes and self.modes in (frozenset(), frozenset(tree.modules)):
            self._one_mode = self.training
        self.pool = CopyPool(base, tree)
        self.plans = Plans(base, tree)
        self.statistics = _uses_statistics(tree)
        self._fast_path = FastPath(base, tree, ())
        self._keeps_order = False
        self._models: LRU[ref[Adapter], AdaptedModel] = LRU(self.max_models)
        self._lock = threading.RLock()

    def in_mode(self, training: bool) -> MixedBatchRunner:
        """The same network with all modules in one mode."""
        return self if self._one_mode == training else MixedBatchRunner(self.base, training)

    def model(self, adapter: Adapter) -> AdaptedModel:
        """An adapter as a model, with the adapter's own tensors. The models used last are cached."""
        found = self._models.get(adapter.reference)
        if found is None:
            with self._lock:  # one model for all threads
                found = self._models.get(adapter.reference)
                if found is None:
                    found = self._models.put(ref(adapter, self._models.discard), self._new_model(adapter))
        return found

    def _new_model(self, adapter: Adapter) -> AdaptedModel:
        if self.statistics is not None:
            adapter.add_buffers()
        with lasting_outside():
            pool = adapter.copy_pool()
            pool.train(self.training)
            if self._one_mode is None and pool.current_modes() != self.modes:
                others = pool.tree.modules.keys() - self.pool.tree.modules.keys()
                pool.set_modes(self.modes | {name for name in others if pool.trains(name)})
        return AdaptedModel(adapter, pool)

    def compiled(self, models: Sequence[AdaptedModel]) -> CompiledBank:
        """Runs a batch by indices of these adapters in a compiled function."""
        return CompiledBank(self.base, self.pool.tree.copy(clone), models)

    @cached_property
    def view(self) -> BaseView:
        """The network without an adapter."""
        return BaseView(self.pool)

    def run_base(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the network without an adapter; for its forward that is `__call__`."""
        self.base.watch()
        return self.pool.run(method, args, kwargs, self._fast_path.bindings({}, ()), {}, private_buffers=True)

    def run_apart(self, adapter: Adapter, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the network on samples of one adapter."""
        return getattr(self.model(adapter), method)(*args, **kwargs)

    def run(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "__call__") -> Any:
        """A method of the network on a batch.

        Args:
            batch: the adapters of its samples.
            args: positional arguments.
            kwargs: keyword arguments.
            method: the method's name; for the network's forward that is `__call__`.

        Raises:
            AdaptError: if the arguments are no such batch, or its samples cannot be told apart at a weight.
        """
        leaves, spec = tree_flatten((args, kwargs))
        check_size(leaves, len(batch.adapters))
        distinct = dict.fromkeys(batch.adapters)
        if len(distinct) <= 1:
            return self._run_one(next(iter(distinct), None), method, args, kwargs)
        if self.statistics is None and not any(adapter is not None and adapter.why_apart for adapter in distinct):
            try:
                return self._together(batch, leaves, spec, method)
            except ApartError:
                pass
        return self._one_by_one(batch, leaves, spec, method, None if method == "__call__" else self._padding(kwargs))

    def _run_one(self, adapter: Adapter | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run_base(method, args, kwargs) if adapter is None else self.run_apart(adapter, method, args, kwargs)

    def _together(self, batch: Batch, leaves: Sequence[Any], spec: TreeSpec, method: str) -> Any:
        size = len(batch.adapters)
        given = Arguments.of(leaves, spec, size)
        keeps_order = self._keeps_order if method == "__call__" else self._returns_order(given.whole()[1])
        order = torch.tensor(batch.order) if given.allow(batch.order) and not keeps_order else None
        segments = batch.segments(ordered=order is not None)
        plan = self.plans.of([adapter for adapter, _ in segments], self.modes)
        if plan.apart or plan.fast_path.is_taken():
            raise ApartError
        counts = [count for _, count in segments]
        arguments = given if order is None else given.ordered(order)
        if method != "__call__":
            found, out_spec, axes = self._stepping(plan, counts, arguments, method)
        else:
            found, out_spec, axes = self._forward(plan, counts, arguments)
            if order is not None and any(is_opaque(leaf) or is_mixed(leaf) for leaf in found):
                self._keeps_order = True  # such an output cannot be put in the caller's order afterwards
                return self._together(batch, leaves, spec, method)
        back = None if order is None else torch.argsort(order)
        made = [put_back(leaf, one, back, size) for leaf, one in zip(found, axes, strict=True)]
        return tree_unflatten([stepped(leaf, size) if isinstance(leaf, GeneratorType) else leaf for leaf in made], out_spec)

    def _forward(self, plan: Plan, counts: Sequence[int], arguments: Arguments) -> Output:
        """One forward: tracked, or by the path that was recorded for an earlier call of its kind."""
        path = None if arguments.kind is None else plan.paths.get(arguments.kind)
        if path is None:
            return self._tracked(plan, counts, arguments)
        try:
            return self._replayed(plan, counts, arguments, path)
        except DivergedError:
            plan.paths.pop(arguments.kind, None)
            plan.divergences[arguments.kind] += 1
            return self._tracked(plan, counts, arguments)

    def _replayed(self, plan: Plan, counts: Sequence[int], arguments: Arguments, path: RecordedPath) -> Output:
        segments = Segments(counts, path.uses)
        args, kwargs = arguments.whole()
        with plan.slots(segments) as slots, self.pool.checkout(slots, {}, private_buffers=False) as (copy, _):
            with ReplayReads(path.answers) if path.answers else nullcontext():
                found, out_spec = tree_flatten(copy.tree.module(*args, **kwargs))
            tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
            if segments.uses is None or len(segments.uses) != len(path.uses) or len(tensors) != len(path.axes):
                raise DivergedError
        axes = iter(path.axes)
        return found, out_spec, [next(axes) if isinstance(leaf, Tensor) else None for leaf in found]

    def _tracked(self, plan: Plan, counts: Sequence[int], arguments: Arguments) -> Output:
        segments, kind = Segments(counts), arguments.kind
        args, kwargs = arguments.tagged()
        with plan.slots(segments) as slots, self.pool.checkout(slots, {}, private_buffers=False) as (copy, call):
            with TrackSamples(segments.size) as mode:
                found, out_spec = tree_flatten(call.returns(copy.tree.module(*args, **kwargs)))
            segments.outlived = call.outlived
        axes = [output_axis(leaf) for leaf in found]
        mixed = segments.outlived or mode.depends_on_values or any(map(is_mixed, found))
        if kind is not None and segments.uses is not None and not mixed and plan.divergences[kind] < MAX_DIVERGENCES:
            of_output = tuple(one for leaf, one in zip(found, axes, strict=True) if isinstance(leaf, Tensor))
            plan.paths[kind] = RecordedPath(tuple(segments.uses), of_output, tuple(mode.answers))
        return found, out_spec, axes

    def _stepping(self, plan: Plan, counts: Sequence[int], arguments: Arguments, method: str) -> Output:
        """A method that calls the network repeatedly."""
        segments = Segments(counts)
        args, kwargs = arguments.tagged()
        with (
            torch.no_grad(),  # as in generate, so that the call begins in the mode that it runs in
            plan.slots(segments) as slots,
            self.pool.checkout(slots, {}, private_buffers=False) as (copy, _),
            stepping(copy.tree.module, plan, segments),
        ):
            found, out_spec = tree_flatten(getattr(copy.tree.module, method)(*args, **kwargs))
        return found, out_spec, [_of_samples(leaf, segments.size) for leaf in found]

    def _one_by_one(self, batch: Batch, leaves: list[Any], spec: TreeSpec, method: str, fill: int | None) -> Any:
        """One call for the samples of each adapter, and their outputs concatenated; shorter sequences of tokens are padded."""
        size = len(batch.adapters)
        alike = shared(leaves, size)
        if alike is None:
            raise AdaptError(
                f"an argument has two axes of length {size}, so it cannot be told which of its parts belong to which sample, "
                "and these adapters cannot share a pass. Call bank[name](...) with the samples of each."
            )
        groups: dict[Adapter | None, list[int]] = {}
        for index, adapter in enumerate(batch.adapters):
            groups.setdefault(adapter, []).append(index)
        outputs: list[tuple[list[Any], int]] = []
        out_spec = spec
        for adapter, indices in groups.items():
            samples = torch.tensor(indices)
            given = [
                tag(leaf.index_select(0, samples.to(leaf.device)), SampleAxis(0, 1))
                if isinstance(leaf, Tensor) and leads(leaf, size) and place not in alike
                else leaf
                for place, leaf in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(given, spec)
            with TrackSamples(len(indices)):
                found, this_spec = tree_flatten(self._run_one(adapter, method, args, kwargs))
            if outputs and this_spec != out_spec:
                raise AdaptError(
                    "the outputs differ in form by adapter, so they cannot be put together: call bank[name] for each"
                )
            out_spec = this_spec
            if method != "__call__":
                found = [tag(leaf, _of_samples(leaf, len(indices))) if isinstance(leaf, Tensor) else leaf for leaf in found]
            outputs.append((found, len(indices)))
        back = torch.argsort(torch.tensor([index for indices in groups.values() for index in indices]))
        made = [merged([(found[place], count) for found, count in outputs], back, fill) for place in range(len(outputs[0][0]))]
        return tree_unflatten(made, out_spec)

    def _returns_order(self, kwargs: dict[str, Any]) -> bool:
        """Whether `generate` returns more than tokens, such as a cache or the indices of beams in the batch."""
        config = getattr(self.pool.module, "generation_config", None)
        return bool(kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False)))

    def _padding(self, kwargs: dict[str, Any]) -> int:
        """The token id with which `generate` pads shorter sequences."""
        config = kwargs.get("generation_config") or getattr(self.pool.module, "generation_config", None)
        for name in ("pad_token_id", "eos_token_id"):
            found = kwargs.get(name, getattr(config, name, None))
            if found is not None:
                return int(found[0] if isinstance(found, (list, tuple)) else found)
        return 0


def _of_samples(leaf: Any, size: int) -> SampleAxis | None:
    """The sample axis of an output of `generate`, which may have several neighbouring sequences for each sample."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or not leaf.shape[0] or leaf.shape[0] % size:
        return None
    return SampleAxis(0, leaf.shape[0] // size)


def _uses_statistics(tree: ModuleTree) -> str | None:
    """The name of a module that takes statistics of its batch."""
    for name, module in tree.modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return name or "the model"
    return None
