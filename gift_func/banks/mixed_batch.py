"""One pass of a network over a batch whose samples have adapters of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..adapted_model import AdaptedModel
from ..errors import AdaptError
from ..network.fast_path import runs_fused
from ..network.frozen_base import BaseView, FrozenBase
from ..network.modes import Modes, modes_in, modes_of, put
from ..network.module_tree import ModuleTree, clone
from ..network.runner import Runner
from ..tracking.replay import DivergedError, ReplayReads
from ..tracking.sample_axis import SampleAxis, TrackSamples, tag
from .arguments import Arguments
from .compiled import CompiledBank
from .entry import Adapter
from .generation import stepped, stepping
from .plan import Batch, Plan, Plans, RecordedPath
from .routing import ApartError
from .samples import check_size, is_mixed, is_opaque, leads, merged, put_back, rows_out, shared
from .segments import Segments

Found = tuple[list[Any], TreeSpec, Sequence[SampleAxis | None]]
"""The leaves of an output, its tree, and where the samples lie in each of them."""

MOST_STRAYS = 3
"""After so many calls of a kind that did not go the remembered way, a call of it is always followed."""


class MixedBatchRunner:
    """The network that a bank's adapters share: private copies of its structure, one for each call under way.

    Args:
        base: the frozen base.
        modes: the modes that its modules are put in.

    Attributes:
        modes: those that they are in.
    """

    def __init__(self, base: FrozenBase, modes: Modes | bool) -> None:
        self.base = base
        structure = base.structure.copy(clone)
        put(structure, modes)
        self.modes = modes_of(structure)
        self.training = "" in self.modes
        self._as_one = modes if isinstance(modes, bool) else None
        if base.has_plain_modes and self.modes in (frozenset(), frozenset(structure.modules)):
            self._as_one = self.training
        self.body = Runner(base, structure, ())
        self.body.bind_base()
        self.plans = Plans(base, structure)
        self.statistics = _uses_statistics(structure)
        self._keeps_order = False

    def in_mode(self, training: bool) -> MixedBatchRunner:
        """The same network with all modules in a mode."""
        return self if self._as_one == training else MixedBatchRunner(self.base, training)

    def model(self, entry: Adapter) -> AdaptedModel:
        """An adapter as a model of its own."""
        if self.statistics is not None:
            entry.keep_statistics()
        made = entry.model().train(self.training)
        if self._as_one is None and modes_in(made._body) != self.modes:
            structure = made._body.structure
            put(structure, self.modes | {name for name in modes_of(structure) if name not in self.body.structure.modules})
            made._body.bind_between_calls(made.adapter.current())
        return made

    def gathered(self, models: Sequence[AdaptedModel]) -> CompiledBank:
        """What runs a batch by indices of these adapters in a compiled function."""
        return CompiledBank(self.base, self.body.structure.copy(clone), models)

    def view(self) -> BaseView:
        """The network without an adapter."""
        return BaseView(self.base, self.body.structure)

    def plain(self, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network, or one of its methods, without an adapter."""
        with self.body.bound({}, {}, private_buffers=True) as (twin, call):
            return call.returns(_bound(twin.structure.module, method)(*args, **kwargs))

    def run(
        self,
        batch: Batch,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        model_of: Callable[[Adapter], Callable[..., Any]],
        method: str | None = None,
    ) -> Any:
        """The network, or one of its methods, on a batch.

        Args:
            batch: the adapters of its samples.
            args: positional arguments.
            kwargs: keyword arguments.
            model_of: an adapter as a model of its own.
            method: a method's name; None for a call.

        Raises:
            AdaptError: if the arguments are not such a batch, or its samples cannot be told apart at a weight.
        """
        leaves, spec = tree_flatten((args, kwargs))
        check_size(leaves, len(batch.entries))

        def alone(entry: Adapter | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.plain(method, args, kwargs) if entry is None else _bound(model_of(entry), method)(*args, **kwargs)

        distinct = set(batch.entries)
        if len(distinct) <= 1:
            return alone(next(iter(distinct), None), args, kwargs)
        if self.statistics is None and not any(entry is not None and entry.apart for entry in distinct):
            try:
                return self._together(batch, leaves, spec, method)
            except ApartError:
                pass
        return _one_by_one(batch, leaves, spec, alone, method, None if method is None else self._padding(kwargs))

    def _together(self, batch: Batch, leaves: Sequence[Any], spec: TreeSpec, method: str | None) -> Any:
        size = len(batch.entries)
        given = Arguments.of(leaves, spec, size)
        as_given = self._keeps_order if method is None else self._tells(given.whole()[1])
        order = torch.tensor(batch.order) if given.allow(batch.order) and not as_given else None
        runs = batch.runs(ordered=order is not None)
        plan = self.plans.of([entry for entry, _ in runs], self.modes)
        if plan.apart or (plan.fused and runs_fused(self.body.structure, ())):
            raise ApartError
        counts = [count for _, count in runs]
        arguments = given if order is None else given.ordered(order)
        if method is not None:
            found, out_spec, rows = self._stepping(plan, counts, arguments, method)
        else:
            found, out_spec, rows = self._forward(plan, counts, arguments)
            if order is not None and any(is_opaque(leaf) or is_mixed(leaf) for leaf in found):
                self._keeps_order = True  # what comes out in an order of ours could not be put back: go by the caller's
                return self._together(batch, leaves, spec, method)
        back = None if order is None else torch.argsort(order)
        made = [put_back(leaf, one, back, size) for leaf, one in zip(found, rows, strict=True)]
        return tree_unflatten([stepped(leaf, size) if isinstance(leaf, GeneratorType) else leaf for leaf in made], out_spec)

    def _forward(self, plan: Plan, counts: Sequence[int], arguments: Arguments) -> Found:
        """One forward: by tags, or as an earlier call of its kind found."""
        way = None if arguments.kind is None else plan.ways.get(arguments.kind)
        if way is None:
            return self._followed(plan, counts, arguments)
        try:
            return self._replayed(plan, counts, arguments, way)
        except DivergedError:
            plan.ways.pop(arguments.kind, None)
            plan.strays[arguments.kind] += 1
            return self._followed(plan, counts, arguments)

    def _replayed(self, plan: Plan, counts: Sequence[int], arguments: Arguments, way: RecordedPath) -> Found:
        mix = Segments(counts, way.uses)
        args, kwargs = arguments.whole()
        with plan.slots(mix) as slots, self.body.checkout(slots, {}, private_buffers=False) as (twin, _):
            with ReplayReads(way.answers) if way.answers else nullcontext():
                found, out_spec = tree_flatten(twin.structure.module(*args, **kwargs))
            tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
            if mix.met is None or len(mix.met) != len(way.uses) or len(tensors) != len(way.rows):
                raise DivergedError
        rows = iter(way.rows)
        return found, out_spec, [next(rows) if isinstance(leaf, Tensor) else None for leaf in found]

    def _followed(self, plan: Plan, counts: Sequence[int], arguments: Arguments) -> Found:
        mix, kind = Segments(counts), arguments.kind
        args, kwargs = arguments.tagged()
        with plan.slots(mix) as slots, self.body.checkout(slots, {}, private_buffers=False) as (twin, call):
            with TrackSamples(mix.size) as mode:
                found, out_spec = tree_flatten(call.returns(twin.structure.module(*args, **kwargs)))
            mix.outlived = call.outlived
        rows = [rows_out(leaf) for leaf in found]
        mixed = mix.outlived or mode.depends_on_values or any(map(is_mixed, found))
        if kind is not None and mix.met is not None and not mixed and plan.strays[kind] < MOST_STRAYS:
            of_output = tuple(one for leaf, one in zip(found, rows, strict=True) if isinstance(leaf, Tensor))
            plan.ways[kind] = RecordedPath(tuple(mix.met), of_output, tuple(mode.answers))
        return found, out_spec, rows

    def _stepping(self, plan: Plan, counts: Sequence[int], arguments: Arguments, method: str) -> Found:
        """A method that calls the network again and again."""
        mix = Segments(counts)
        args, kwargs = arguments.tagged()
        with (
            torch.no_grad(),  # as generate has it: so a call begins in the mode it runs in
            plan.slots(mix) as slots,
            self.body.checkout(slots, {}, private_buffers=False) as (twin, _),
            stepping(twin.structure.module, plan, mix),
        ):
            found, out_spec = tree_flatten(getattr(twin.structure.module, method)(*args, **kwargs))
        return found, out_spec, [_of_samples(leaf, mix.size) for leaf in found]

    def _tells(self, kwargs: dict[str, Any]) -> bool:
        """Whether `generate` tells more than the tokens: where in a batch of beams each came from, a cache."""
        config = getattr(self.body.module, "generation_config", None)
        return bool(kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False)))

    def _padding(self, kwargs: dict[str, Any]) -> int:
        """What `generate` fills rows up with that end early."""
        config = kwargs.get("generation_config") or getattr(self.body.module, "generation_config", None)
        for name in ("pad_token_id", "eos_token_id"):
            found = kwargs.get(name, getattr(config, name, None))
            if found is not None:
                return int(found[0] if isinstance(found, (list, tuple)) else found)
        return 0


def _one_by_one(
    batch: Batch,
    leaves: list[Any],
    spec: TreeSpec,
    alone: Callable[[Adapter | None, tuple[Any, ...], dict[str, Any]], Any],
    method: str | None,
    fill: int | None,
) -> Any:
    """Each adapter's samples by themselves, put together; rows of token ids that end early are filled up."""
    size = len(batch.entries)
    alike = shared(leaves, size)
    if alike is None:
        raise AdaptError(
            f"an argument has two axes of length {size}, so it cannot be told which of its parts belong to which sample, "
            "and these adapters cannot share a pass. Call bank[name](...) with the samples of each."
        )
    groups: dict[Adapter | None, list[int]] = {}
    for index, entry in enumerate(batch.entries):
        groups.setdefault(entry, []).append(index)
    outputs: list[tuple[list[Any], int]] = []
    out_spec = spec
    for entry, indices in groups.items():
        rows = torch.tensor(indices)
        given = [
            tag(leaf.index_select(0, rows.to(leaf.device)), SampleAxis(0, 1))
            if isinstance(leaf, Tensor) and leads(leaf, size) and place not in alike
            else leaf
            for place, leaf in enumerate(leaves)
        ]
        args, kwargs = tree_unflatten(given, spec)
        with TrackSamples(len(indices)):
            found, this_spec = tree_flatten(alone(entry, args, kwargs))
        if outputs and this_spec != out_spec:
            raise AdaptError("the outputs differ in form by adapter, so they cannot be put together: call bank[name] for each")
        out_spec = this_spec
        if method is not None:
            found = [tag(leaf, _of_samples(leaf, len(indices))) if isinstance(leaf, Tensor) else leaf for leaf in found]
        outputs.append((found, len(indices)))
    back = torch.argsort(torch.tensor([index for indices in groups.values() for index in indices]))
    made = [merged([(found[place], count) for found, count in outputs], back, fill) for place in range(len(outputs[0][0]))]
    return tree_unflatten(made, out_spec)


def _bound(model: Any, method: str | None) -> Callable[..., Any]:
    found: Callable[..., Any] = model if method is None else getattr(model, method)
    return found


def _of_samples(leaf: Any, size: int) -> SampleAxis | None:
    """Where the samples lie in an output of `generate`: several neighbours for each, if it returns several sequences."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or not leaf.shape[0] or leaf.shape[0] % size:
        return None
    return SampleAxis(0, leaf.shape[0] // size)


def _uses_statistics(structure: ModuleTree) -> str | None:
    """A module whose output for one sample depends on the others: it must see one adapter's samples alone."""
    for name, module in structure.modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return name or "the model"
    return None
