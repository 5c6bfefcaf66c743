"""What becomes of a tensor that is written to by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .indexing import Item, along, indexed, steps_of
from .layout import LOST, SampleAxis, Tag, Untracked, merge, owner_index, picked
from .table import Args, Batch, Kwargs, aligned, argument, follows, tag_of


def written(batch: Batch, target: Tensor, items: Sequence[Item], value: Any) -> Tag:
    """The tag of a tensor after a value was written, or added, where an index points.

    A tensor of the batch keeps its tag if what is written somewhere is of the sample that is there. A buffer that is not
    (zeros, say) is of the batch from now on: it gets the first layout that puts every sample written where its own rows are.
    """
    rows = tag_of(target)
    if isinstance(rows, Untracked):
        return rows
    asked, shape = indexed(target.shape, None, items, batch)
    wanted = merge(asked, aligned(value, shape, batch), shape, batch.size) if isinstance(value, Tensor) else asked
    if wanted is None or isinstance(wanted, Untracked):
        return rows if wanted is None else LOST
    if rows is not None:
        candidates = [rows]
    else:
        steps = {axis: step for step, axis in items}
        candidates = []
        for axis, size in enumerate(target.shape):
            full = isinstance(steps[axis], slice) and len(range(*steps[axis].indices(size))) == size
            layouts = [wanted] if full and shape[wanted.axis] == size else batch.layouts.get(size, [])
            candidates.extend(rows.on(axis) for rows in layouts)
    for candidate in candidates:
        found, _ = indexed(target.shape, candidate, items, batch)
        if isinstance(found, SampleAxis) and isinstance(merge(found, wanted, shape, batch.size), SampleAxis):
            return candidate
    return LOST


@follows("__setitem__", tolerant=True)
def setitem(batch: Batch, args: Args, kwargs: Kwargs, result: None) -> Tag:
    """`x[index] = value`."""
    x, index, value = args
    items = steps_of(index, x.dim(), batch)
    if items is None or any(isinstance(step, Tensor) and step.dim() == 0 for step, _ in items):
        return LOST
    return written(batch, x, items, value)


@follows("index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_", tolerant=True)
def index_write(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Writing by a vector along one axis."""
    x, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    value = args[3] if len(args) > 3 else kwargs.get("source", kwargs.get("value"))
    return written(batch, x, along(x, dim, index.reshape(-1), batch), value)


@follows("index_put index_put_", tolerant=True)
def index_put(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Writing by several tensors."""
    x = args[0]
    indices, value = argument(args, kwargs, 1, "indices"), argument(args, kwargs, 2, "values")
    items = steps_of(tuple(slice(None) if index is None else index for index in indices), x.dim(), batch)
    return LOST if items is None else written(batch, x, items, value)


@follows("scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_")
def scatter(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Writing by an index for every element along an axis."""
    x, dim, index = args[0], argument(args, kwargs, 1, "dim") % args[0].dim(), argument(args, kwargs, 2, "index")
    value = args[3] if len(args) > 3 else kwargs.get("src", kwargs.get("value"))
    rows, wanted = tag_of(x), tag_of(index)
    if isinstance(value, Tensor) and tag_of(value) is not None:
        wanted = merge(wanted, tag_of(value) if value.shape == index.shape else LOST, index.shape, batch.size)
    if not isinstance(wanted, SampleAxis):
        return wanted or rows
    size, axis = index.shape[wanted.axis], wanted.axis
    if axis != dim:
        return merge(rows, wanted if x.shape[axis] == size else LOST, x.shape, batch.size)
    line = owner_index(wanted, size, batch.size, index.device).reshape([-1 if a == dim else 1 for a in range(x.dim())])
    for candidate in [rows] if isinstance(rows, SampleAxis) else batch.layouts.get(x.shape[dim], []):
        known = candidate.axis == dim or rows is None
        if known and bool((picked(candidate, x.shape[dim], index, batch.size) == line).all()):
            return candidate.on(dim)
    return LOST


@follows("masked_scatter masked_scatter_ put_ put")
def mixed(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Elements in the order in which they come, across samples."""
    return LOST
