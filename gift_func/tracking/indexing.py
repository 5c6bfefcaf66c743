"""Reading by index: the samples of the result follow from the values of the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import UNTRACKED, SampleAxis, Tag, Untracked, merge, picked, placed, set_tag
from .table import Args, BatchInfo, Kwargs, argument, contract, only_first, rule_for, tag_of

Item = tuple[Any, int]
"""One step of an index and the axis of the tensor that it indexes, -1 for a new axis."""


def steps_of(index: Any, n: int, batch: BatchInfo) -> list[Item] | None:
    """An index of a tensor of n axes as steps, with a mask as its positions; None for an index of a kind that is not known."""
    steps: list[Any] = []
    for step in index if isinstance(index, tuple) else [index]:
        if isinstance(step, (list, range)):
            if not all(isinstance(item, (int, bool)) for item in step):
                return None
            step = torch.as_tensor(list(step))
        single = isinstance(step, Tensor) and step.dim() == 0
        if isinstance(step, bool) or (single and (step.dtype == torch.bool or tag_of(step) is not None)):
            return None
        if isinstance(step, Tensor) and step.dtype == torch.bool:
            steps.extend(_mask_positions(step, batch))
        else:
            steps.append(int(step) if single else step)
    whole = [slice(None)] * (n - sum(step is not None and step is not Ellipsis for step in steps))
    at = next((i for i, step in enumerate(steps) if step is Ellipsis), len(steps))
    steps[at : at + 1] = whole
    items: list[Item] = []
    axis = 0
    for step in steps:
        items.append((step, -1 if step is None else axis))
        axis += step is not None
    return items


def _mask_positions(mask: Tensor, batch: BatchInfo) -> Sequence[Tensor]:
    """A mask's positions, one vector for each of its axes; each position is of the sample of that element of the mask."""
    found = mask.nonzero(as_tuple=True)
    tag = tag_of(mask)
    if isinstance(tag, SampleAxis):
        tag = SampleAxis(0, 1, picked(tag, mask.shape[tag.axis], found[tag.axis], batch.size))
    for position in found:
        set_tag(position, tag)
    return found


def _sliced(tag: SampleAxis, axis: int, size: int, step: slice, batch: BatchInfo) -> SampleAxis:
    start, stop, stride = step.indices(size)
    if start == 0 and stop >= size and stride == 1:
        return tag.on(axis)
    return SampleAxis(axis, 1, picked(tag, size, step, batch.size))


def axis_of_owners(owners: Tensor) -> tuple[int, Tensor] | None:
    """The only axis along which owners vary, and the owners along it; None if they vary along several."""
    if owners.dim() == 1:
        return 0, owners
    for axis, size in enumerate(owners.shape):
        table = owners.movedim(axis, 0).reshape(size, -1)
        if table.numel() and bool((table == table[:, :1]).all()):
            return axis, table[:, 0]
    return None


def indexed(shape: Sequence[int], tag: Tag, items: Sequence[Item], batch: BatchInfo) -> tuple[Tag, list[int]]:
    """The tag and the shape of what an index, as `steps_of` returns it, reads from a tensor of this shape and tag.

    Tensors among the steps are broadcast together. Their axes are where the steps were if those are adjacent, otherwise
    first. A single number removes its axis, as in torch, and does not count as a tensor, as it would in numpy.
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
    if isinstance(tag, Untracked):
        return tag, out
    if isinstance(tag, SampleAxis):
        i = next((i for i, (_, axis) in enumerate(kept) if axis == tag.axis), None)
        if i is None:
            return UNTRACKED, out
        step, axis = kept[i]
        if isinstance(step, Tensor):
            owned_by = i
            where = axis_of_owners(picked(tag, shape[axis], step.expand(block), batch.size))
            if where is None:
                return UNTRACKED, out
            found = SampleAxis(start + where[0], 1, where[1])
        else:
            found = _sliced(tag, spot[i], shape[axis], step, batch)
            if any(tag_of(kept[j][0]) is not None for j in places):
                return UNTRACKED, out
    for i in places:
        mark = tag_of(kept[i][0])
        # An index of the sample axis only selects rows, and a row's sample is known whatever the index was computed from.
        if i == owned_by or mark is None:
            continue
        if isinstance(mark, SampleAxis):
            size = kept[i][0].shape[mark.axis]
            axis = len(block) - kept[i][0].dim() + mark.axis
            mark = placed(mark, start + axis, size, block[axis], batch.size)
        found = merge(found, mark, out, batch.size)
    return found, out


def _only_slices(tag: SampleAxis, index: Sequence[Any], n: int) -> SampleAxis | None:
    """The tag after an index of slices, numbers and new axes that takes all of the sample axis; None for any other index."""
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
            if axis <= tag.axis < axis + skipped:
                return tag.on(out + tag.axis - axis)
            axis, out = axis + skipped, out + skipped
        elif step is None:
            out += 1
        elif axis == tag.axis:
            whole = type(step) is slice and step.start is None and step.stop is None and step.step is None
            return tag.on(out) if whole else None
        else:
            axis, out = axis + 1, out + (type(step) is slice)
    return tag.on(out + tag.axis - axis)


@rule_for("__getitem__", tolerant=True)
def track_getitem(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Reading by index. A row of a tensor without a tag, such as a table, is of the sample of the index that selects it."""
    x, index = args
    tag = tag_of(x)
    if isinstance(tag, Untracked):
        return tag
    if tag is not None:
        simple = _only_slices(tag, index if isinstance(index, tuple) else (index,), x.dim())
        if simple is not None:
            return simple
    items = steps_of(index, x.dim(), batch)
    if items is None:
        return UNTRACKED
    batch.note(tag, x.shape)
    found, shape = indexed(x.shape, tag, items, batch)
    return found if shape == list(result.shape) else UNTRACKED


@rule_for("index_select", tolerant=True)
def track_index_select(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Reading by a vector along one axis."""
    x, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    batch.note(tag_of(x), x.shape)
    return indexed(x.shape, tag_of(x), along(x, dim, index), batch)[0]


def along(x: Tensor, dim: int, index: Tensor) -> list[Item]:
    """The steps of an index of one axis of a tensor; a single number as a vector."""
    return [(index.reshape(-1) if axis == dim % x.dim() else slice(None), axis) for axis in range(x.dim())]


@rule_for("gather take_along_dim", tolerant=True)
def track_gather(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Reading by an index for every element along an axis."""
    x = args[0] if args else kwargs["input"]
    given = {"dim": kwargs.get("dim"), "index": kwargs.get("index", kwargs.get("indices"))}
    for value in args[1:]:
        given["index" if isinstance(value, Tensor) else "dim"] = value
    index, dim, tag = given["index"], given["dim"], tag_of(x)
    if dim is None or index.dim() != x.dim():
        return UNTRACKED
    dim %= x.dim()
    if isinstance(tag, SampleAxis) and tag.axis == dim:
        where = axis_of_owners(picked(tag, x.shape[dim], index.expand(result.shape), batch.size))
        return UNTRACKED if where is None else SampleAxis(where[0], 1, where[1])
    axes = list(range(x.dim()))
    return contract([(x, ["read" if axis == dim else axis for axis in axes]), (index, axes)], axes, result.shape, batch)


@rule_for(F.embedding)
def track_embedding(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A row of the table for every index."""
    return only_first(args, kwargs)[1]


@rule_for(F.embedding_bag)
def track_embedding_bag(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Bags of one size: `[bags, indices]`, and weights of the same shape."""
    bags, weights = args[0] if args else kwargs["input"], argument(args, kwargs, 7, "per_sample_weights")
    if bags.dim() == 2:
        return contract([(bags, "bi"), (weights, "bi")], "bd", result.shape, batch)
    return UNTRACKED
