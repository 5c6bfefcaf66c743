"""A parameter whose value differs by sample: what each torch function does with one.

The rows of a batch lie in runs, neighbours of one adapter each. A function that meets a routed parameter runs on each
run's rows with that run's own weight, and the results are put together again: so every function and every method is
routed, by the rules that hold for a single adapter. A linear layer whose weights are all low-rank does it in one piece.
Where the rows are is not guessed from shapes: the batch is followed (`many.rows`) from the network's input on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import AdaptError
from ..weights import Dense, Slot, Weight
from ..weights.call import current
from ..weights.names import METADATA
from ..weights.value import autocasts
from .low_rank_runs import LowRankRuns
from .mix import Mix
from .rows import Following, Lost, Rows, owner_index, rows_of, tag


class ApartError(Exception):
    """The adapters of a batch cannot share a pass: each must take one of its own."""


class Routed(Weight):
    """A weight for each run of a batch; as a whole it has a shape, and no value.

    Args:
        members: one for each run.
        name: of the parameter, for errors.
    """

    def __init__(self, members: Sequence[Weight], name: str) -> None:
        self.members = tuple(members)
        self.name = name
        self._low_rank: dict[bool, LowRankRuns | Literal[False]] = {}

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

    def low_rank(self, transposed: bool = False) -> LowRankRuns | None:
        """The runs' factors in one piece, if all that have any are low-rank changes of one matrix.

        Args:
            transposed: of the weight's transpose.
        """
        kept = self._low_rank.get(transposed)
        if kept is None or (isinstance(kept, LowRankRuns) and not kept.is_good):
            members = [member.mT for member in self.members] if transposed else self.members
            kept = self._low_rank[transposed] = LowRankRuns.of(members) or False
        return kept or None


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
    product = _PRODUCTS.get(func)
    if product is not None and not kwargs:
        made = product(*args)
        if made is not None:
            return made
    leaves, spec = tree_flatten((args, kwargs))
    slots = [leaf for leaf in leaves if isinstance(leaf, RoutedSlot)]
    weight, mix = slots[0].weight, slots[0].mix
    mix.elsewhere()
    _look_for_checkpoints(slots)
    if getattr(func, "__name__", "").endswith("grouped_mm"):
        return _by_experts(func, args, kwargs)
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
    return _by_runs(func, leaves, spec, followed, mix)


def _look_for_checkpoints(slots: Sequence[RoutedSlot]) -> None:
    call = current()
    if call is not None and call.grad:
        call.look(slot.weight for slot in slots)
        if call.checkpointed:
            raise ApartError  # the checkpoint runs it again when the rows are no longer known


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor | None:
    """The layer in one piece, or None where its weights are not all low-rank."""
    if not isinstance(weight, RoutedSlot) or isinstance(input, Slot) or isinstance(bias, Slot) or input.ndim < 2:
        return None
    runs, mix = weight.weight.low_rank(transposed), weight.mix
    if runs is None or input.dtype != runs.base.dtype or autocasts(input) or not mix.in_front(weight.weight.name, input):
        return None
    _look_for_checkpoints((weight,))
    return runs.linear(mix, input, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor | None:
    return _linear(input, other, None, transposed=True)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor | None:
    return _linear(mat1, mat2, input, transposed=True) if input.ndim == 1 else None


_PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.linear, torch._C._nn.linear), _linear),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
}


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


def _by_experts(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`grouped_mm` of tokens sorted by expert: the tokens of each run with its own experts, the groups counted anew."""
    x, weight, *rest = args
    offs = rest[0] if rest else kwargs.get("offs")
    rows = rows_of(x)
    if not isinstance(weight, RoutedSlot) or not isinstance(rows, Rows) or rows.axis != 0 or not isinstance(offs, Tensor):
        raise AdaptError(
            "grouped_mm meets a parameter that differs by sample in a form in which its tokens cannot be told apart. Give this "
            "call samples of one adapter, bank[name](...)."
        )
    run = weight.mix.run_of(owner_index(rows, x.shape[0], weight.mix.size, x.device))
    expert = torch.bucketize(torch.arange(x.shape[0], device=x.device), offs.to(torch.int64), right=True)
    parts, places = [], []
    for index in range(len(weight.mix.counts)):
        own = (run == index).nonzero().squeeze(-1)
        counts = torch.bincount(expert[own], minlength=offs.shape[0])[: offs.shape[0]]
        ends = counts.cumsum(0).to(offs.dtype)
        if own.numel():
            parts.append(func(x.index_select(0, own), _member(weight, index), **{**kwargs, "offs": ends}))
            places.append(own)
    return torch.cat(parts).index_select(0, torch.argsort(torch.cat(places)))


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
