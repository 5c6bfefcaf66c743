"""Runs a torch function on each segment's samples with the segment's own weights, and concatenates the outputs."""

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
    func: Callable[..., Any], leaves: list[Any], spec: Any, axes: Mapping[int, SampleAxis], segments: Segments
) -> Any:
    """A function with each segment's own weights, run on each segment's samples, and the outputs concatenated.

    Args:
        func: the function.
        leaves: the leaves of its arguments.
        spec: the tree of its arguments.
        axes: place of a leaf -> its sample axis.
        segments: the call's segments.
    """
    made = _at_once(func, leaves, spec, axes, segments)
    if made is not None:
        return made
    split = {place: _split(leaves[place], axis, segments) for place, axis in axes.items()}
    orders = {place: order for place, (_, order) in split.items()}
    in_order = all(orders[place] is None and axis.owners is None for place, axis in axes.items())
    outputs: list[list[Any]] = []
    out_spec = None
    for index, count in enumerate(segments.counts):
        given = [one_of_equals(member(leaf, index), segments.size, count) for leaf in leaves]
        for place, axis in axes.items():
            part = split[place][0][index]
            regular = axis.owners is None and orders[place] is None
            # Otherwise the whole part is tagged as one sample's, which is enough to follow the axis.
            given[place] = tag(part, SampleAxis(axis.axis, axis.inner if regular else max(part.shape[axis.axis], 1)))
        is_last = index == len(segments.counts) - 1
        if any(given[place].shape[axis.axis] == 0 for place, axis in axes.items()) and (outputs or not is_last):
            continue  # if all are empty, the last one's output is empty too
        args, kwargs = tree_unflatten(given, spec)
        with TrackSamples(count if in_order else 1):
            flat, out_spec = tree_flatten(func(*args, **kwargs))
        outputs.append(flat)
    order = next((order for order in orders.values() if order is not None), None)
    whole = [_concatenated(parts, order, func) for parts in zip(*outputs, strict=True)]
    assert out_spec is not None
    return tree_unflatten(whole, out_spec)


MIN_SEGMENTS = 4
"""With so many segments one function under `torch.vmap` costs less than one call for each."""


def _at_once(func: Callable[..., Any], leaves: list[Any], spec: Any, axes: Mapping[int, SampleAxis], segments: Segments) -> Any:
    """One call for equally long segments with weights of one kind; None if they differ or torch has no batching rule."""
    count, alike = segments.counts[0], segments.even
    regular = all(
        axis.owners is None and leaves[place].shape[axis.axis] == axis.inner * segments.size for place, axis in axes.items()
    )
    if alike < MIN_SEGMENTS or not regular or "conv" in getattr(func, "__name__", "") or segments.size > count * alike:
        return None
    stacks = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Placeholder):
            stack = leaf.weight.stacked(alike)
            if stack is None:
                return None
            stacks[place] = stack
    parts = {place: (leaves[place].unflatten(axis.axis, (alike, -1)), axis.axis) for place, axis in axes.items()}
    seen: list[tuple[list[Any], Any]] = []

    def one(own: Sequence[Any]) -> list[Tensor]:
        given = [
            tag(leaf, SampleAxis(axes[place].axis, axes[place].inner))
            if place in axes
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
    for axis in found:
        if not isinstance(axis, (SampleAxis, Untracked)):
            whole.append(axis)  # a leaf that is no tensor
            continue
        result = next(results)
        if isinstance(axis, Untracked):
            return None  # one call for each segment raises the error
        whole.append(result.movedim(0, axis.axis).flatten(axis.axis, axis.axis + 1))
    return tree_unflatten(whole, out_spec)


def by_experts(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`grouped_mm` of tokens sorted by expert, with each segment's own experts for its tokens."""
    x, weight, *rest = args
    offs = rest[0] if rest else kwargs.get("offs")
    axis = sample_axis_of(x)
    if not (isinstance(weight, Placeholder) and isinstance(axis, SampleAxis) and axis.axis == 0 and isinstance(offs, Tensor)):
        raise AdaptError(
            "grouped_mm meets a parameter that differs by sample in a form in which its tokens cannot be told apart. Give this "
            "call samples of one adapter, bank[name](...)."
        )
    segment = weight.segments.segment_of(owner_index(axis, x.shape[0], weight.segments.size, x.device))
    expert = torch.bucketize(torch.arange(x.shape[0], device=x.device), offs.to(torch.int64), right=True)
    parts, indices = [], []
    for index in range(len(weight.segments.counts)):
        own = (segment == index).nonzero().squeeze(-1)
        counts = torch.bincount(expert[own], minlength=offs.shape[0])[: offs.shape[0]]
        ends = counts.cumsum(0).to(offs.dtype)
        if own.numel():
            parts.append(func(x.index_select(0, own), member(weight, index), **{**kwargs, "offs": ends}))
            indices.append(own)
    return torch.cat(parts).index_select(0, torch.argsort(torch.cat(indices)))


def _split(tensor: Tensor, axis: SampleAxis, segments: Segments) -> tuple[Sequence[Tensor], Tensor | None]:
    """Each segment's part of a tensor, and the order that it was sorted in; None if it did not have to be."""
    size = tensor.shape[axis.axis]
    if axis.owners is None and size == axis.inner * segments.size:
        return tensor.split([count * axis.inner for count in segments.counts], axis.axis), None
    segment = segments.segment_of(owner_index(axis, size, segments.size, tensor.device))
    order = torch.argsort(segment, stable=True)
    sizes = torch.bincount(segment, minlength=len(segments.counts)).tolist()
    return tensor.index_select(axis.axis, order).split(sizes, axis.axis), order


def _concatenated(parts: Sequence[Any], order: Tensor | None, func: Callable[..., Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    axis = sample_axis_of(parts[0])
    if not isinstance(axis, SampleAxis):
        name = getattr(func, "__name__", repr(func))
        raise AdaptError(
            f"{name} meets a parameter that differs by sample, and mixes the samples or is not known to keep them apart. Give "
            "this call samples of one adapter, bank[name](...)."
        )
    whole = torch.cat(list(parts), dim=axis.axis)
    return whole if order is None else whole.index_select(axis.axis, torch.argsort(order))
