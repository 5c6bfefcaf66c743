"""A torch function on the rows of each segment with that segment's own weights, put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import AdaptError
from ..tracking.sample_axis import SampleAxis, TrackSamples, Untracked, owner_index, sample_axis_of, tag
from .routed_weight import Placeholder, member, one_of_equals
from .segments import Segments
from .stacked_weights import run_at_once


def by_segment(
    func: Callable[..., Any], leaves: list[Any], spec: Any, followed: Mapping[int, SampleAxis], segments: Segments
) -> Any:
    """The function on the rows of each segment with its own weights, put together."""
    made = _at_once(func, leaves, spec, followed, segments)
    if made is not None:
        return made
    plan = {place: _split(leaves[place], rows, segments) for place, rows in followed.items()}
    outputs: list[list[Any]] = []
    out_spec = None
    order: Tensor | None = None
    for _, given_order in plan.values():
        order = given_order if order is None else order
    for index, count in enumerate(segments.counts):
        own = []
        for place, leaf in enumerate(leaves):
            if place in plan:
                part = plan[place][0][index]
                rows = followed[place]
                regular = rows.owners is None and plan[place][1] is None
                own.append(tag(part, SampleAxis(rows.axis, rows.inner) if regular else _all_of_one(rows, part)))
            else:
                own.append(one_of_equals(member(leaf, index), segments.size, count))
        if any(leaves[p] is not own[p] and own[p].shape[followed[p].axis] == 0 for p in plan):
            outputs.append([])
            continue
        args, kwargs = tree_unflatten(own, spec)
        samples = count if all(plan[p][1] is None and followed[p].owners is None for p in plan) else 1
        with TrackSamples(samples):
            flat, out_spec = tree_flatten(func(*args, **kwargs))
        outputs.append(flat)
    present = [flat for flat in outputs if flat]
    whole = [_joined([flat[place] for flat in present], order, func) for place in range(len(present[0]))]
    assert out_spec is not None
    return tree_unflatten(whole, out_spec)


FEW = 4
"""Segments from which on one function under `torch.vmap` costs less than one call for each."""


def _at_once(
    func: Callable[..., Any], leaves: list[Any], spec: Any, followed: Mapping[int, SampleAxis], segments: Segments
) -> Any:
    """The function on equally long segments of alike weights at once; None where they are not, or torch has no rule for it."""
    count, alike = segments.counts[0], segments.even
    regular = all(
        rows.owners is None and leaves[place].shape[rows.axis] == rows.inner * segments.size for place, rows in followed.items()
    )
    if alike < FEW or not regular or "conv" in getattr(func, "__name__", "") or segments.size > count * alike:
        return None
    stacks = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Placeholder):
            stack = leaf.weight.stacked(alike)
            if stack is None:
                return None
            stacks[place] = stack
    parts = {place: (leaves[place].unflatten(rows.axis, (alike, -1)), rows.axis) for place, rows in followed.items()}
    seen: list[tuple[list[Any], Any]] = []

    def one(own: Sequence[Any]) -> list[Tensor]:
        given = [
            tag(leaf, SampleAxis(followed[place].axis, followed[place].inner))
            if place in followed
            else one_of_equals(leaf, segments.size, count)
            for place, leaf in enumerate(own)
        ]
        args, kwargs = tree_unflatten(given, spec)
        with TrackSamples(count):
            flat, out_spec = tree_flatten(func(*args, **kwargs))
        seen.append(([sample_axis_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat], out_spec))
        return [leaf for leaf in flat if isinstance(leaf, Tensor)]

    try:
        results = iter(run_at_once(one, parts, stacks, leaves))
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("vmap", "VmapMode rule", "BatchedTensor")):
            raise
        for place in stacks:
            leaves[place].weight.cannot_stack(alike)
        return None
    found, out_spec = seen[0]
    whole = []
    for rows in found:
        if not isinstance(rows, (SampleAxis, Untracked)):
            whole.append(rows)
            continue
        result = next(results)
        if isinstance(rows, Untracked):
            return None  # the calls one by one say what is wrong
        whole.append(result.movedim(0, rows.axis).flatten(rows.axis, rows.axis + 1))
    return tree_unflatten(whole, out_spec)


def by_experts(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`grouped_mm` of tokens sorted by expert: the tokens of each segment with its own experts, the groups counted anew."""
    x, weight, *rest = args
    offs = rest[0] if rest else kwargs.get("offs")
    rows = sample_axis_of(x)
    if (
        not isinstance(weight, Placeholder)
        or not isinstance(rows, SampleAxis)
        or rows.axis != 0
        or not isinstance(offs, Tensor)
    ):
        raise AdaptError(
            "grouped_mm meets a parameter that differs by sample in a form in which its tokens cannot be told apart. Give this "
            "call samples of one adapter, bank[name](...)."
        )
    segment = weight.segments.segment_of(owner_index(rows, x.shape[0], weight.segments.size, x.device))
    expert = torch.bucketize(torch.arange(x.shape[0], device=x.device), offs.to(torch.int64), right=True)
    parts, places = [], []
    for index in range(len(weight.segments.counts)):
        own = (segment == index).nonzero().squeeze(-1)
        counts = torch.bincount(expert[own], minlength=offs.shape[0])[: offs.shape[0]]
        ends = counts.cumsum(0).to(offs.dtype)
        if own.numel():
            parts.append(func(x.index_select(0, own), member(weight, index), **{**kwargs, "offs": ends}))
            places.append(own)
    return torch.cat(parts).index_select(0, torch.argsort(torch.cat(places)))


def _split(tensor: Tensor, rows: SampleAxis, segments: Segments) -> tuple[Sequence[Tensor], Tensor | None]:
    """Each segment's rows of a tensor, and the order they were brought in, if they had to be."""
    size = tensor.shape[rows.axis]
    if rows.owners is None and size == rows.inner * segments.size:
        return tensor.split([count * rows.inner for count in segments.counts], rows.axis), None
    segment = segments.segment_of(owner_index(rows, size, segments.size, tensor.device))
    order = torch.argsort(segment, stable=True)
    sizes = torch.bincount(segment, minlength=len(segments.counts)).tolist()
    return tensor.index_select(rows.axis, order).split(sizes, rows.axis), order


def _joined(parts: Sequence[Any], order: Tensor | None, func: Callable[..., Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    rows = sample_axis_of(parts[0])
    if not isinstance(rows, SampleAxis):
        name = getattr(func, "__name__", repr(func))
        raise AdaptError(
            f"{name} meets a parameter that differs by sample, and mixes the samples or is not known to keep them apart. Give "
            "this call samples of one adapter, bank[name](...)."
        )
    whole = torch.cat(list(parts), dim=rows.axis)
    return whole if order is None else whole.index_select(rows.axis, torch.argsort(order))


def _all_of_one(rows: SampleAxis, part: Tensor) -> SampleAxis:
    """The tag of rows that, to the functions of one segment, are of one sample."""
    return SampleAxis(rows.axis, max(part.shape[rows.axis], 1))
