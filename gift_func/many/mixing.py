"""One pass of a network over a batch whose samples have adapters of their own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..adapted import AdaptedModel
from ..base import BaseView, FrozenBase
from ..body import Body
from ..errors import AdaptError
from ..fused import fused_names, guards, runs_fused
from ..structure import Structure, clone
from ..weights import Slot
from .entry import Entry
from .following.layout import put
from .routed import ApartError, Mix, Routed, RoutedSlot
from .rows import Following, Lost, Rows, rows_of, tag

Run = tuple[Entry | None, int]
MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""What a transformers model's `generate` calls the model's input."""


@dataclass(frozen=True)
class Batch:
    """The adapters of one call's samples.

    Attributes:
        entries: each sample's; None for the base alone.
        order: the samples ordered by adapter, those without one last; None if they come so.
    """

    entries: tuple[Entry | None, ...]
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


def arrange(entries: Sequence[Entry | None]) -> Batch:
    """The adapters of one call's samples, and the order by adapter: as each is met first, None last."""
    rank: dict[Entry | None, int] = {}
    for entry in entries:
        rank.setdefault(entry, len(rank))
    keys = [len(rank) if entry is None else rank[entry] for entry in entries]
    order = tuple(sorted(range(len(keys)), key=keys.__getitem__))
    return Batch(tuple(entries), None if order == tuple(range(len(keys))) else order)


@dataclass(frozen=True)
class Plan:
    """What stands in the network's places for one sequence of runs.

    Attributes:
        routed: the parameters that differ by run.
        guards: parameters that must be slots too (`fused.guards`).
        fused: whether a fused kernel would read an adapted parameter.
        apart: whether an adapted parameter is one of a module that runs all samples through one kernel (an LSTM).
    """

    routed: dict[str, Routed]
    guards: list[str]
    fused: bool
    apart: bool


class Network:
    """The network that a bank's adapters share: private copies of its structure, one for each call under way.

    Args:
        base: the frozen base.
        training: the mode it runs in.
    """

    PLANS = 8

    def __init__(self, base: FrozenBase, training: bool) -> None:
        self.base = base
        structure = base.structure.copy(clone)
        structure.module.train(training)
        self.training = training
        self.body = Body(base, structure, ())
        self.body.rest_on_base()
        self.statistics = _uses_statistics(structure)
        self._plans: OrderedDict[tuple[Entry | None, ...], tuple[int, Plan]] = OrderedDict()
        self._lock = threading.Lock()
        self._keeps_order = False

    def in_mode(self, training: bool) -> Network:
        """The same network in a mode."""
        return Network(self.base, training)

    def model(self, entry: Entry) -> AdaptedModel:
        """An adapter as a model of its own."""
        return entry.model(self.body.structure.copy(clone)).train(self.training)

    def view(self) -> BaseView:
        """The network without an adapter."""
        return BaseView(self.base, self.body.structure)

    def run(
        self,
        batch: Batch,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        apart: Callable[[Entry | None], Any],
        method: str | None = None,
    ) -> Any:
        """The network, or one of its methods, on a batch.

        Args:
            batch: the adapters of its samples.
            args: positional arguments.
            kwargs: keyword arguments.
            apart: what runs one adapter's samples by themselves.
            method: a method's name; None for a call.

        Raises:
            AdaptError: if the arguments are not such a batch, or its samples cannot be told apart at a weight.
        """
        leaves, spec = tree_flatten((args, kwargs))
        size = len(batch.entries)
        _check_size(leaves, size)
        distinct = set(batch.entries)
        if len(distinct) <= 1:
            return _bound(apart(next(iter(distinct), None)), method)(*args, **kwargs)
        if self.statistics is None and not any(entry is not None and entry.apart for entry in distinct):
            try:
                return self._together(batch, leaves, spec, method)
            except ApartError:
                pass
        return self._one_by_one(batch, leaves, spec, apart, method)

    def _together(self, batch: Batch, leaves: list[Any], spec: TreeSpec, method: str | None) -> Any:
        size = len(batch.entries)
        alone = _shared(leaves, size)
        opaque = any(_is_opaque(leaf) for leaf in leaves)
        ordered = batch.order is not None and alone is not None and not opaque and not (self._keeps_order and method is None)
        runs = batch.runs(ordered)
        plan = self._plan([entry for entry, _ in runs])
        if plan.apart or (plan.fused and runs_fused(self.body.structure, ())):
            raise ApartError
        mix = Mix([count for _, count in runs])
        order = torch.tensor(batch.order) if ordered else None
        given = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and _leads(leaf, size) and place not in (alone or _doubtful(leaves, size)):
                leaf = tag(leaf if order is None else leaf.index_select(0, order.to(leaf.device)), Rows(0, 1))
            given.append(leaf)
        args, kwargs = tree_unflatten(given, spec)
        slots: dict[str, Tensor] = {name: RoutedSlot.holding(routed, mix) for name, routed in plan.routed.items()}
        slots.update((name, Slot.of(self.base.weights[name])) for name in plan.guards if name not in slots)
        with self.body.lent(slots, {}, private_buffers=False) as (twin, _):
            module = twin.structure.module
            if method is None:
                with Following(size):
                    made = module(*args, **kwargs)
            else:
                with _tagging(module, size), Following(size):
                    made = getattr(module, method)(*args, **kwargs)
        found, out_spec = tree_flatten(made)
        if order is not None and method is None and any(_is_opaque(leaf) or _is_mixed(leaf) for leaf in found):
            self._keeps_order = True  # what comes out in an order of ours could not be put back: go by the caller's
            return self._together(batch, leaves, spec, method)
        back = None if order is None else torch.argsort(order)
        return tree_unflatten([_put_back(leaf, back, size, method) for leaf in found], out_spec)

    def _plan(self, entries: Sequence[Entry | None]) -> Plan:
        key = tuple(entries)
        epoch = self.base.watch()
        with self._lock:
            known = self._plans.get(key)
            if known is not None and known[0] == epoch:
                self._plans.move_to_end(key)
                return known[1]
        weights = [{} if entry is None else entry.weights(self.training) for entry in entries]
        names = dict.fromkeys(name for found in weights for name in found)
        base = self.base.weights
        routed = {name: Routed([found.get(name, base[name]) for found in weights], name) for name in names}
        structure = self.body.structure
        recurrent = any(isinstance(structure.places[name][0][0], (nn.RNNBase, nn.RNNCellBase)) for name in names)
        plan = Plan(routed, guards(structure, names), bool(fused_names(structure, names)), recurrent)
        if all(entry is None or entry.rests(self.training) for entry in entries):
            with self._lock:
                self._plans[key] = epoch, plan
                while len(self._plans) > self.PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _one_by_one(
        self,
        batch: Batch,
        leaves: list[Any],
        spec: TreeSpec,
        apart: Callable[[Entry | None], Any],
        method: str | None,
    ) -> Any:
        """Each adapter's samples by themselves, put together."""
        size = len(batch.entries)
        alone = _shared(leaves, size)
        if alone is None:
            raise AdaptError(
                f"an argument has two axes of length {size}, so it cannot be told which of its parts belong to which sample, "
                "and these adapters cannot share a pass. Call bank[name](...) with the samples of each."
            )
        groups: dict[Entry | None, list[int]] = {}
        for index, entry in enumerate(batch.entries):
            groups.setdefault(entry, []).append(index)
        outputs, out_spec = [], spec
        for entry, indices in groups.items():
            rows = torch.tensor(indices)
            given = [
                tag(leaf.index_select(0, rows.to(leaf.device)), Rows(0, 1))
                if isinstance(leaf, Tensor) and _leads(leaf, size) and place not in alone
                else leaf
                for place, leaf in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(given, spec)
            with Following(len(indices)):
                found, out_spec = tree_flatten(_bound(apart(entry), method)(*args, **kwargs))
            outputs.append((found, len(indices)))
        back = torch.argsort(torch.tensor([index for indices in groups.values() for index in indices]))
        made = [_merged([(found[place], count) for found, count in outputs], back) for place in range(len(outputs[0][0]))]
        return tree_unflatten(made, out_spec)


def _bound(model: Any, method: str | None) -> Callable[..., Any]:
    found: Callable[..., Any] = model if method is None else getattr(model, method)
    return found


def _check_size(leaves: Sequence[Any], size: int) -> None:
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if first is None:
        raise AdaptError("the bank was given no tensor to run on")
    if first.ndim == 0 or first.shape[0] != size:
        raise AdaptError(
            f"adapters names {size} samples, and the first tensor has shape {tuple(first.shape)}: give one name, or None, for "
            "each index of its leading axis"
        )


def _leads(tensor: Tensor, size: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == size


def _doubtful(leaves: Sequence[Any], size: int) -> set[int]:
    """Tensors whose leading axis may be of the batch's length by chance: a mask [T, T], states [layers, batch, d]."""
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return {place for place, leaf in tensors[1:] if _leads(leaf, size) and leaf.ndim > 1 and leaf.shape[1] == size}


def _shared(leaves: Sequence[Any], size: int) -> set[int] | None:
    """Tensors that all samples share; None if that cannot be told."""
    if _doubtful(leaves, size):
        return None
    return {place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not _leads(leaf, size)}


def _is_opaque(leaf: Any) -> bool:
    """Whether a leaf may hold tensors where no tree finds them: a key-value cache, say."""
    return not isinstance(
        leaf, (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    ) and hasattr(leaf, "__dict__")


def _is_mixed(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and _lost(leaf)


def _lost(leaf: Tensor) -> bool:
    rows = rows_of(leaf)
    return isinstance(rows, Lost) or (isinstance(rows, Rows) and rows.owners is not None)


def _put_back(leaf: Any, back: Tensor | None, size: int, method: str | None) -> Any:
    """An output in the caller's order, without a tag."""
    if not isinstance(leaf, Tensor):
        if back is not None and hasattr(leaf, "reorder_cache"):
            leaf.reorder_cache(back)
        return leaf
    if isinstance(leaf, RoutedSlot):
        raise AdaptError(f"the network returns its parameter {leaf.weight.name!r}, which differs by sample in this batch")
    rows = rows_of(leaf)
    if method is not None and leaf.ndim and leaf.shape[0] and leaf.shape[0] % size == 0:
        rows = Rows(0, leaf.shape[0] // size)
    put(leaf, None)
    if back is None or not isinstance(rows, Rows):
        return leaf
    return _reordered(leaf, rows, back, size)


def _reordered(leaf: Tensor, rows: Rows, back: Tensor, size: int) -> Tensor:
    places = torch.arange(leaf.shape[rows.axis]).view(-1, size, rows.inner)[:, back].flatten()
    return leaf.index_select(rows.axis, places.to(leaf.device))


def _merged(parts: Sequence[tuple[Any, int]], back: Tensor) -> Any:
    """An output of several groups of samples as that of the batch."""
    first = parts[0][0]
    if not isinstance(first, Tensor):
        return first
    found = {_rows_out(leaf, count) for leaf, count in parts}
    if len(found) != 1 or None in found:
        raise AdaptError(
            f"an output of shape {tuple(first.shape)} cannot be told apart by sample, and these adapters cannot share a pass. "
            "Call bank[name](...) with the samples of each; compute what is of the whole batch (a loss) from the outputs."
        )
    axis, inner = next(pair for pair in found if pair is not None)
    whole = torch.cat([leaf for leaf, _ in parts], dim=axis)
    return _reordered(whole, Rows(axis, inner), back, back.numel())


def _rows_out(leaf: Tensor, count: int) -> tuple[int, int] | None:
    """Axis and number of neighbours of each sample in an output; None if they cannot be told."""
    rows = rows_of(leaf)
    if isinstance(rows, Rows) and rows.owners is None and leaf.shape[rows.axis] == count * rows.inner:
        return rows.axis, rows.inner
    plain = leaf.ndim > 0 and leaf.shape[0] == count and list(leaf.shape).count(count) == 1
    return (0, 1) if rows is None and plain else None


@contextmanager
def _tagging(module: nn.Module, size: int) -> Iterator[None]:
    """While `generate` runs: the input of each of its calls of the network is the batch, beams and all."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {}
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                if name in MAIN and value.ndim and value.shape[0] % size == 0:
                    value = tag(value, Rows(0, value.shape[0] // size))
                elif isinstance(rows_of(value), Lost):
                    value = tag(value, None)
            given[name] = value
        return args, given

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _uses_statistics(structure: Structure) -> str | None:
    """A module whose output for one sample depends on the others: it must see one adapter's samples alone."""
    for name, module in structure.modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return name or "the model"
    return None
