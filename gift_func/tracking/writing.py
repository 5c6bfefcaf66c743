"""Writing by index: the tag of a tensor that was written to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .indexing import Item, along, indexed, steps_of
from .layout import UNTRACKED, SampleAxis, Tag, Untracked, merge, owner_index, picked
from .table import Args, BatchInfo, Kwargs, aligned, argument, rule_for, tag_of


def written(batch: BatchInfo, target: Tensor, items: Sequence[Item], value: Any) -> Tag:
    """The tag of a tensor after a value was written, or added, at an index.

    A tensor with a sample axis keeps it if every element is written at an index of its own sample. A buffer without a tag
    (zeros, say) gets one: the first candidate for a sample axis with which that holds.
    """
    tag = tag_of(target)
    if isinstance(tag, Untracked):
        return tag
    asked, shape = indexed(target.shape, None, items, batch)
    wanted = merge(asked, aligned(value, shape, batch), shape, batch.size) if isinstance(value, Tensor) else asked
    if wanted is None or isinstance(wanted, Untracked):
        return tag if wanted is None else UNTRACKED
    if tag is not None:
        candidates = [tag]
    else:
        steps = {axis: step for step, axis in items}
        candidates = []
        for axis, size in enumerate(target.shape):
            full = isinstance(steps[axis], slice) and len(range(*steps[axis].indices(size))) == size
            layouts = [wanted] if full and shape[wanted.axis] == size else batch.layouts.get(size, [])
            candidates.extend(tag.on(axis) for tag in layouts)
    for candidate in candidates:
        found, _ = indexed(target.shape, candidate, items, batch)
        if isinstance(found, SampleAxis) and isinstance(merge(found, wanted, shape, batch.size), SampleAxis):
            return candidate
    return UNTRACKED


@rule_for("__setitem__", tolerant=True)
def track_setitem(batch: BatchInfo, args: Args, kwargs: Kwargs, result: None) -> Tag:
    """`x[index] = value`."""
    x, index, value = args
    items = steps_of(index, x.dim(), batch)
    return UNTRACKED if items is None else written(batch, x, items, value)


@rule_for("index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_", tolerant=True)
def track_index_write(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Writing by a vector along one axis."""
    x, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    value = args[3] if len(args) > 3 else kwargs.get("source", kwargs.get("value"))
    return written(batch, x, along(x, dim, index), value)


@rule_for("index_put index_put_", tolerant=True)
def track_index_put(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Writing by several index tensors."""
    x = args[0]
    indices, value = argument(args, kwargs, 1, "indices"), argument(args, kwargs, 2, "values")
    items = steps_of(tuple(slice(None) if index is None else index for index in indices), x.dim(), batch)
    return UNTRACKED if items is None else written(batch, x, items, value)


@rule_for("scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_")
def track_scatter(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Writing by an index for every element along an axis."""
    x, dim, index = args[0], argument(args, kwargs, 1, "dim") % args[0].dim(), argument(args, kwargs, 2, "index")
    value = args[3] if len(args) > 3 else kwargs.get("src", kwargs.get("value"))
    tag, wanted = tag_of(x), tag_of(index)
    if isinstance(value, Tensor) and tag_of(value) is not None:
        wanted = merge(wanted, tag_of(value) if value.shape == index.shape else UNTRACKED, index.shape, batch.size)
    if not isinstance(wanted, SampleAxis):
        return wanted or tag
    size, axis = index.shape[wanted.axis], wanted.axis
    if axis != dim:
        return merge(tag, wanted if x.shape[axis] == size else UNTRACKED, x.shape, batch.size)
    line = owner_index(wanted, size, batch.size, index.device).reshape([-1 if a == dim else 1 for a in range(x.dim())])
    for candidate in [tag] if isinstance(tag, SampleAxis) else batch.layouts.get(x.shape[dim], []):
        known = candidate.axis == dim or tag is None
        if known and bool((picked(candidate, x.shape[dim], index, batch.size) == line).all()):
            return candidate.on(dim)
    return UNTRACKED


@rule_for("masked_scatter masked_scatter_ put_ put")
def track_mixed(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Elements are taken in order, whatever sample they are of."""
    return UNTRACKED
