"""What an index reads: which sample is where follows from the index's own values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import LOST, SampleAxis, Tag, Untracked, merge, picked, placed, put
from .table import Args, Batch, Kwargs, argument, contract, follows, only_first, tag_of

Item = tuple[Any, int]
"""One step of an index and the axis of the tensor that it stands for, -1 for a new axis."""


def steps_of(index: Any, n: int, batch: Batch) -> list[Item] | None:
    """An index on n axes as steps; a mask becomes the positions that it holds.

    Returns:
        None for an index of a kind that is not known.
    """
    steps: list[Any] = []
    for step in index if isinstance(index, tuple) else [index]:
        if isinstance(step, (list, range)):
            if not all(isinstance(item, (int, bool)) for item in step):
                return None
            step = torch.as_tensor(list(step))
        if isinstance(step, bool) or (isinstance(step, Tensor) and step.dim() == 0 and step.dtype == torch.bool):
            return None
        if isinstance(step, Tensor) and step.dtype == torch.bool:
            steps.extend(_positions(step, batch))
        elif isinstance(step, Tensor) and step.dim() == 0 and tag_of(step) is None:
            steps.append(int(step))
        else:
            steps.append(step)
    whole = [slice(None)] * (n - sum(step is not None and step is not Ellipsis for step in steps))
    at = next((i for i, step in enumerate(steps) if step is Ellipsis), len(steps))
    steps[at : at + 1] = whole
    items: list[Item] = []
    axis = 0
    for step in steps:
        items.append((step, -1 if step is None else axis))
        axis += step is not None
    return items


def _positions(mask: Tensor, batch: Batch) -> Sequence[Tensor]:
    """A mask's positions, one vector for each of its axes; each position is of the sample that its part of the mask is of."""
    found = mask.nonzero(as_tuple=True)
    rows = tag_of(mask)
    if isinstance(rows, SampleAxis):
        rows = SampleAxis(0, 1, picked(rows, mask.shape[rows.axis], found[rows.axis], batch.size))
    for position in found:
        put(position, rows)
    return found


def _sliced(rows: SampleAxis, axis: int, size: int, step: slice, batch: Batch) -> SampleAxis:
    start, stop, stride = step.indices(size)
    if start == 0 and stop >= size and stride == 1:
        return rows.on(axis)
    return SampleAxis(axis, 1, picked(rows, size, step, batch.size))


def spread(owners: Tensor) -> tuple[int, Tensor] | None:
    """The axis along which alone owners vary, and the owners along it; None if there is no such axis."""
    for axis, size in enumerate(owners.shape):
        if owners.dim() == 1:
            return 0, owners
        table = owners.movedim(axis, 0).reshape(size, -1)
        if table.numel() and bool((table == table[:, :1]).all()):
            return axis, table[:, 0]
    return None


def indexed(shape: Sequence[int], rows: Tag, items: Sequence[Item], batch: Batch) -> tuple[Tag, list[int]]:
    """The tag and the shape of what an index reads from a tensor.

    Tensors among the steps are broadcast together. Their axes stand where the steps stood if those are neighbours, else
    first. A single number is a slice of one that goes away, as in torch, and not a tensor, as it is in numpy.

    Args:
        shape: of the tensor.
        rows: the tensor's tag.
        items: as `steps_of` gives them.
        batch: the call's.
    """
    kept = [(step, axis) for step, axis in items if not isinstance(step, int)]
    places = [i for i, (step, _) in enumerate(kept) if isinstance(step, Tensor)]
    block = list(torch.broadcast_shapes(*(kept[i][0].shape for i in places))) if places else []
    adjacent = not places or places[-1] - places[0] + 1 == len(places)
    start = places[0] if places and adjacent else 0
    plain = [i for i in range(len(kept)) if i not in places]
    sizes = [1 if kept[i][0] is None else len(range(*kept[i][0].indices(shape[kept[i][1]]))) for i in plain]
    out = [*sizes[:start], *block, *sizes[start:]]
    spot = {i: (j if j < start else j + len(block)) for j, i in enumerate(plain)}

    found: Tag = None
    owned_by = -1
    if isinstance(rows, Untracked):
        return rows, out
    if isinstance(rows, SampleAxis):
        i = next((i for i, (_, axis) in enumerate(kept) if axis == rows.axis), None)
        if i is None:
            return LOST, out
        step, axis = kept[i]
        if isinstance(step, Tensor):
            owned_by = i
            where = spread(picked(rows, shape[axis], step.expand(block), batch.size))
            if where is None:
                return LOST, out
            found = SampleAxis(start + where[0], 1, where[1])
        else:
            found = _sliced(rows, spot[i], shape[axis], step, batch)
            if any(tag_of(kept[j][0]) is not None for j in places):
                return LOST, out
    for i in places:
        mark = tag_of(kept[i][0])
        # What stands on the samples' axis only chooses among rows, and a row's sample is known whatever chose it.
        if i == owned_by or mark is None:
            continue
        if isinstance(mark, SampleAxis):
            size = kept[i][0].shape[mark.axis]
            axis = len(block) - kept[i][0].dim() + mark.axis
            mark = placed(mark, start + axis, size, block[axis], batch.size)
        found = merge(found, mark, out, batch.size)
    return found, out


def _only_slices(rows: SampleAxis, index: Sequence[Any], n: int) -> SampleAxis | None:
    """The tag after an index of slices, numbers and new axes that leaves the samples' axis whole; None for any other index."""
    given = 0
    for step in index:
        kind = type(step)
        if kind is slice or kind is int:
            given += 1
        elif step is not None and step is not Ellipsis:
            return None
    axis, out = 0, 0
    for step in index:
        if step is Ellipsis:
            skipped = n - given
            if axis <= rows.axis < axis + skipped:
                return rows.on(out + rows.axis - axis)
            axis, out = axis + skipped, out + skipped
        elif step is None:
            out += 1
        elif axis == rows.axis:
            whole = type(step) is slice and step.start is None and step.stop is None and step.step is None
            return rows.on(out) if whole else None
        else:
            axis, out = axis + 1, out + (type(step) is slice)
    return rows.on(out + rows.axis - axis)


@follows("__getitem__", tolerant=True)
def getitem(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Reading by index. From a tensor that is not of the batch, a table, each row is of the sample that asked for it."""
    x, index = args
    rows = tag_of(x)
    if isinstance(rows, Untracked):
        return rows
    if rows is not None:
        simple = _only_slices(rows, index if isinstance(index, tuple) else (index,), x.dim())
        if simple is not None:
            return simple
    items = steps_of(index, x.dim(), batch)
    if items is None or any(isinstance(step, Tensor) and step.dim() == 0 for step, _ in items):
        return LOST
    batch.note(rows, x.shape)
    found, shape = indexed(x.shape, rows, items, batch)
    return found if shape == list(result.shape) else LOST


@follows("index_select", tolerant=True)
def index_select(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Reading by a vector along one axis."""
    x, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    items = along(x, dim, index.reshape(-1) if index.dim() == 0 else index, batch)
    batch.note(tag_of(x), x.shape)
    return indexed(x.shape, tag_of(x), items, batch)[0]


def along(x: Tensor, dim: int, index: Tensor, batch: Batch) -> list[Item]:
    """The steps of an index on one axis of a tensor."""
    dim %= x.dim()
    return [(index if axis == dim else slice(None), axis) for axis in range(x.dim())]


@follows("gather take_along_dim", tolerant=True)
def gather(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Reading by an index for every element along an axis."""
    x = args[0] if args else kwargs["input"]
    given = {"dim": kwargs.get("dim"), "index": kwargs.get("index", kwargs.get("indices"))}
    for value in args[1:]:
        given["index" if isinstance(value, Tensor) else "dim"] = value
    index, dim, rows = given["index"], given["dim"], tag_of(x)
    if dim is None or index.dim() != x.dim():
        return LOST
    dim %= x.dim()
    if isinstance(rows, SampleAxis) and rows.axis == dim:
        where = spread(picked(rows, x.shape[dim], index.expand(result.shape), batch.size))
        return LOST if where is None else SampleAxis(where[0], 1, where[1])
    axes = list(range(x.dim()))
    return contract([(x, ["read" if axis == dim else axis for axis in axes]), (index, axes)], axes, result.shape, batch)


@follows(F.embedding)
def embedding(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A row of the table for every index."""
    return only_first(args, kwargs)[1]


@follows(F.embedding_bag)
def embedding_bag(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Bags of one size: `[bags, indices]`, and weights of the same shape."""
    bags, weights = args[0] if args else kwargs["input"], argument(args, kwargs, 7, "per_sample_weights")
    if bags.dim() == 2:
        return contract([(bags, "bi"), (weights, "bi")], "bd", result.shape, batch)
    return LOST
