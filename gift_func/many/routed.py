"""A parameter whose value differs by sample: what each torch function does with one.

The rows of a batch lie in runs, neighbours of one adapter each. A function that meets a routed parameter runs on each
run's rows with that run's own weight, and the results are put together again: so every function and every method is
routed, by the rules that hold for a single adapter. A linear layer whose weights are all low-rank does it in one piece.
Where the rows are is not guessed from shapes: the batch is followed (`many.rows`) from the network's input on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import AdaptError
from ..weights import Dense, LowRank, Slot, Weight
from ..weights.call import current
from ..weights.mixed_linear import mixed_linear
from ..weights.names import METADATA
from ..weights.value import autocasts
from .entry import stacked
from .rows import Following, Lost, Rows, owner_index, rows_of, tag


class ApartError(Exception):
    """The adapters of a batch cannot share a pass: each must take one of its own."""


class Mix:
    """How the samples of one call are divided.

    Args:
        counts: how many samples each run has, in order.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.size = sum(counts)
        self.ends = list(accumulate(counts))
        self._runs: Tensor | None = None

    def run_of(self, owners: Tensor) -> Tensor:
        """The run that each of these samples belongs to."""
        return torch.bucketize(owners, torch.tensor(self.ends, device=owners.device), right=True)


class Routed(Weight):
    """A weight for each run of a batch; as a whole it has a shape, and no value.

    Args:
        members: one for each run.
        name: of the parameter, for errors.
    """

    def __init__(self, members: Sequence[Weight], name: str) -> None:
        self.members = tuple(members)
        self.name = name
        self._low_rank: LowRankRuns | None = None

    @property
    def shape(self) -> torch.Size:
        return self.members[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].dtype

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def dense(self) -> Tensor:
        raise AdaptError(f"{self.name!r} differs by sample in this batch, so it has no single value")

    @property
    def requires_grad(self) -> bool:
        return any(member.requires_grad for member in self.members)

    def low_rank(self) -> LowRankRuns | None:
        """The runs' factors in one piece, if all that have any are low-rank changes of one matrix."""
        kept = self._low_rank
        if kept is None or kept.copied:
            kept = LowRankRuns.of(self.members)
            self._low_rank = kept
        return kept


class LowRankRuns:
    """Low-rank changes of one frozen matrix, stacked.

    Attributes:
        base: W.
        left: B, `(K, out, r)`.
        right: A, `(K, r, in)`.
        scale: s.
        adapted: which runs have one.
        copied: whether the stack is a copy of the adapters' tensors, good for this moment.
    """

    def __init__(self, base: Tensor, changes: Sequence[LowRank], adapted: Sequence[bool]) -> None:
        self.base = base
        self.adapted = tuple(adapted)
        lefts, rights = [change.left for change in changes], [change.right for change in changes]
        scales = [change.scale for change in changes]
        rank = max(left.shape[-1] for left in lefts)
        if any(left.shape[-1] != rank for left in lefts):
            lefts = [F.pad(left, (0, rank - left.shape[-1])) for left in lefts]
            rights = [F.pad(right, (0, 0, 0, rank - right.shape[-2])) for right in rights]
        self.scale = float(scales[0])
        if any(scale != scales[0] for scale in scales):
            lefts = [left * (float(scale) / self.scale) for left, scale in zip(lefts, scales, strict=True)]
        self.left, self.right = stacked(lefts), stacked(rights)
        self.copied = len(changes) > 1 and not (_lies_in(self.left, changes[0].left) and _lies_in(self.right, changes[0].right))

    @staticmethod
    def of(members: Sequence[Weight]) -> LowRankRuns | None:
        """The members' stack, or None where they are of other kinds."""
        base: Tensor | None = None
        changes = []
        for member in members:
            plain = member.base if isinstance(member, LowRank) else member
            if not isinstance(plain, Dense) or plain.tensor.ndim != 2 or (base is not None and not _same(base, plain.tensor)):
                return None
            base = plain.tensor
            if isinstance(member, LowRank):
                fits = member.left.ndim == 2 and member.left.shape[0] == base.shape[0] and not member.dropout
                if not fits or isinstance(member.scale, Tensor) or member.scale == 0 or member.left.dtype != base.dtype:
                    return None
                changes.append(member)
        if base is None or not changes:
            return None
        return LowRankRuns(base, changes, [isinstance(member, LowRank) for member in members])


class RoutedSlot(Slot):
    """The placeholder of a routed parameter in one call."""

    weight: Routed
    mix: Mix

    @staticmethod
    def holding(weight: Routed, mix: Mix) -> RoutedSlot:
        """A new placeholder."""
        plain = Slot.of(weight)
        made = plain.as_subclass(RoutedSlot)
        made.__dict__.update(plain.__dict__)
        made.mix = mix
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _route(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"RoutedSlot({self.weight.name!r})"


def _route(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    slots = [leaf for leaf in leaves if isinstance(leaf, RoutedSlot)]
    weight, mix = slots[0].weight, slots[0].mix
    call = current()
    if call is not None and call.grad:
        call.look(slot.weight for slot in slots)
        if call.checkpointed:
            raise ApartError  # the checkpoint runs it again when the rows are no longer known
    found = [
        (place, rows_of(leaf)) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, Slot)
    ]
    followed = {place: rows for place, rows in found if isinstance(rows, Rows)}
    lost = next((rows for _, rows in found if isinstance(rows, Lost)), None)
    name = getattr(func, "__name__", repr(func))
    if lost is not None:
        raise AdaptError(
            f"{weight.name!r} differs by sample, and {name} meets it with a tensor whose samples cannot be told apart since "
            f"{lost.function or 'a function that mixed them'}. Give this call samples of one adapter, bank[name](...)."
        )
    if not followed:
        for place, _ in found:
            leaf = leaves[place] = _one_of_equals(leaves[place], mix.size, 1)
            if _may_be_of_the_batch(leaf, mix.size):
                raise AdaptError(
                    f"{weight.name!r} differs by sample, and {name} meets it with a tensor of shape {tuple(leaf.shape)} in "
                    "which the batch cannot be found: it did not come from the network's input by functions that torch shows "
                    "(a custom autograd.Function or a scripted function hides it). Give this call samples of one adapter, "
                    "bank[name](...)."
                )
        return _each(func, leaves, spec, mix)
    if func is F.linear or func is torch._C._nn.linear:
        made = _linear(mix, *args, **kwargs)
        if made is not None:
            return made
    return _by_runs(func, leaves, spec, followed, mix)


def _linear(mix: Mix, input: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
    """The layer in one piece, or None where its weights are not all low-rank."""
    if not isinstance(weight, RoutedSlot) or isinstance(bias, Slot) or autocasts(input):
        return None
    runs, rows = weight.weight.low_rank(), rows_of(input)
    if runs is None or not isinstance(rows, Rows) or input.dtype != runs.base.dtype or rows.axis == input.ndim - 1:
        return None
    in_front = rows.axis == 0 and rows.owners is None and input.shape[0] == rows.inner * mix.size
    adapted = runs.adapted
    if not in_front or not all(a or not b for a, b in pairwise(adapted)):
        return None
    each = input[0].numel() // input.shape[-1] * rows.inner
    sizes = tuple(count * each for count, has in zip(mix.counts, adapted, strict=True) if has)
    if not each:
        return None
    flat = input.reshape(-1, input.shape[-1])
    y = mixed_linear(flat, runs.base, bias, runs.left, runs.right, runs.scale, sizes)
    return y.view(*input.shape[:-1], -1)


def _each(func: Callable[..., Any], leaves: list[Any], spec: Any, mix: Mix) -> Any:
    """The function of routed parameters alone: a routed parameter again."""
    results = []
    for run in range(len(mix.counts)):
        own = [_member(leaf, run) for leaf in leaves]
        args, kwargs = tree_unflatten(own, spec)
        results.append(tree_flatten(func(*args, **kwargs)))
    name = next(leaf.weight.name for leaf in leaves if isinstance(leaf, RoutedSlot))
    first, out_spec = results[0]
    made = []
    for place, leaf in enumerate(first):
        if not isinstance(leaf, Tensor):
            made.append(leaf)
            continue
        values = [flat[place] for flat, _ in results]
        weights = [value.weight if isinstance(value, Slot) else Dense(value) for value in values]
        made.append(RoutedSlot.holding(Routed(weights, name), mix))
    return tree_unflatten(made, out_spec)


def _by_runs(func: Callable[..., Any], leaves: list[Any], spec: Any, followed: Mapping[int, Rows], mix: Mix) -> Any:
    """The function on the rows of each run with its own weights, put together."""
    plan = {place: _split(leaves[place], rows, mix) for place, rows in followed.items()}
    outputs: list[list[Any]] = []
    out_spec = None
    order: Tensor | None = None
    for _, given_order in plan.values():
        order = given_order if order is None else order
    for run, count in enumerate(mix.counts):
        own = []
        for place, leaf in enumerate(leaves):
            if place in plan:
                part = plan[place][0][run]
                rows = followed[place]
                regular = rows.owners is None and plan[place][1] is None
                own.append(tag(part, Rows(rows.axis, rows.inner) if regular else _all_of_one(rows, part)))
            else:
                own.append(_one_of_equals(_member(leaf, run), mix.size, count))
        if any(leaves[p] is not own[p] and own[p].shape[followed[p].axis] == 0 for p in plan):
            outputs.append([])
            continue
        args, kwargs = tree_unflatten(own, spec)
        samples = count if all(plan[p][1] is None and followed[p].owners is None for p in plan) else 1
        with Following(samples):
            flat, out_spec = tree_flatten(func(*args, **kwargs))
        outputs.append(flat)
    present = [flat for flat in outputs if flat]
    made = [_joined([flat[place] for flat in present], order, func) for place in range(len(present[0]))]
    assert out_spec is not None
    return tree_unflatten(made, out_spec)


def _split(tensor: Tensor, rows: Rows, mix: Mix) -> tuple[Sequence[Tensor], Tensor | None]:
    """Each run's rows of a tensor, and the order they were brought in, if they had to be."""
    size = tensor.shape[rows.axis]
    if rows.owners is None and size == rows.inner * mix.size:
        return tensor.split([count * rows.inner for count in mix.counts], rows.axis), None
    run = mix.run_of(owner_index(rows, size, mix.size, tensor.device))
    order = torch.argsort(run, stable=True)
    sizes = torch.bincount(run, minlength=len(mix.counts)).tolist()
    return tensor.index_select(rows.axis, order).split(sizes, rows.axis), order


def _joined(parts: Sequence[Any], order: Tensor | None, func: Callable[..., Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    rows = rows_of(parts[0])
    if not isinstance(rows, Rows):
        name = getattr(func, "__name__", repr(func))
        raise AdaptError(
            f"{name} meets a parameter that differs by sample, and mixes the samples or is not known to keep them apart. Give "
            "this call samples of one adapter, bank[name](...)."
        )
    whole = torch.cat(list(parts), dim=rows.axis)
    return whole if order is None else whole.index_select(rows.axis, torch.argsort(order))


def _may_be_of_the_batch(tensor: Tensor, size: int) -> bool:
    """Whether an untagged tensor may have been made from the batch by a function that a mode cannot see."""
    if tensor.ndim == 0 or isinstance(tensor, nn.Parameter):
        return False
    rows = tensor.shape[0]
    return tensor.is_floating_point() or tensor.is_complex() or rows == size or (tensor.ndim == 1 and rows % size == 0)


def _one_of_equals(leaf: Any, size: int, count: int) -> Any:
    """A tensor that was expanded to the batch's size, cut to `count` of its equal rows; anything else as it is."""
    if isinstance(leaf, Slot) or not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return leaf[:count] if leaf.shape[0] == size and leaf.stride(0) == 0 else leaf


def _member(leaf: Any, run: int) -> Any:
    """What stands for a routed parameter in one run; anything else as it is."""
    if not isinstance(leaf, RoutedSlot):
        return leaf
    weight = leaf.weight.members[run]
    return weight.tensor if isinstance(weight, Dense) else Slot.of(weight)


def _all_of_one(rows: Rows, part: Tensor) -> Rows:
    """The tag of rows that, to the functions of one run, are of one sample."""
    return Rows(rows.axis, max(part.shape[rows.axis], 1))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _lies_in(whole: Tensor, part: Tensor) -> bool:
    return whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
