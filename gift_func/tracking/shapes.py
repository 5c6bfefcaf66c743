"""Functions that move, cut and repeat axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import LOST, SampleAxis, Tag, merge, owner_index, picked, reshaped
from .table import Args, Batch, Kwargs, aligned, argument, follows, only_first, tag_of


def _rest(args: Args, kwargs: Kwargs, name: str) -> list[int]:
    """Sizes or axes, given as one sequence or one by one."""
    found = args[1:] or kwargs[name]
    if isinstance(found, int):
        return [found]
    return list(found[0] if isinstance(found[0], Sequence) else found)


@follows("view reshape flatten unflatten ravel view_as reshape_as _unsafe_view", tolerant=True)
def reshape(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The elements keep their order."""
    rows = tag_of(args[0])
    if not isinstance(rows, SampleAxis):
        return rows
    old, new, k = args[0].shape, result.shape, rows.axis + 1
    if old[:k] == new[:k]:
        return rows
    found = reshaped(rows, old, new, batch.size)
    batch.note(found, result.shape)
    return found


@follows("squeeze")
def squeeze(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Axes of size 1 go; a sample axis that goes is lost."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis):
        return rows
    dims = argument(args, kwargs, 1, "dim", tuple(range(x.dim())))
    gone = {dim % x.dim() for dim in (dims if isinstance(dims, Sequence) else [dims]) if x.shape[dim] == 1}
    return LOST if rows.axis in gone else rows.on(rows.axis - sum(dim < rows.axis for dim in gone))


@follows("unsqueeze")
def unsqueeze(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A new axis of size 1."""
    _, rows = only_first(args, kwargs)
    dim = argument(args, kwargs, 1, "dim") % result.dim()
    return rows.on(rows.axis + (dim <= rows.axis)) if isinstance(rows, SampleAxis) else rows


@follows("transpose swapaxes swapdims t adjoint .T .mT .H .mH")
def transpose(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Two axes change places; without a word which, the last two, or all of them."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis):
        return rows
    n = x.dim()
    if len(args) + len(kwargs) == 1:
        # .T turns all the axes round, and the rest the last two; only where there are more than two do they differ.
        if n > 2 and result.shape == x.shape[::-1] and result.stride() == x.stride()[::-1]:
            return rows.on(n - 1 - rows.axis)
        pair = (n - 2, n - 1) if n > 1 else (0, 0)
    else:
        first = kwargs.get("dim0", kwargs.get("axis0"))
        second = kwargs.get("dim1", kwargs.get("axis1"))
        pair = (args[1] if len(args) > 1 else first) % n, (args[2] if len(args) > 2 else second) % n
    return rows.on({pair[0]: pair[1], pair[1]: pair[0]}.get(rows.axis, rows.axis))


@follows("permute")
def permute(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """All axes are put in an order."""
    x, rows = only_first(args, kwargs)
    order = [dim % x.dim() for dim in _rest(args, kwargs, "dims")]
    return rows.on(order.index(rows.axis)) if isinstance(rows, SampleAxis) else rows


@follows("movedim moveaxis")
def movedim(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Some axes are moved, and the others keep their order."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis):
        return rows
    return rows.on(_moved(x.dim(), args[1:], kwargs).index(rows.axis))


def _moved(n: int, args: Args, kwargs: Kwargs) -> list[int]:
    moved = [dims if isinstance(dims, Sequence) else [dims] for dims in (*args, *kwargs.values())]
    source, destination = ([dim % n for dim in dims] for dims in moved)
    rest = iter(dim for dim in range(n) if dim not in source)
    return [source[destination.index(dim)] if dim in destination else next(rest) for dim in range(n)]


@follows("expand expand_as broadcast_to", tolerant=True)
def expand(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The first argument is broadcast; the other gives no more than a shape."""
    return aligned(args[0], result.shape, batch)


@follows("broadcast_tensors")
def broadcast_all(batch: Batch, args: Args, kwargs: Kwargs, result: Sequence[Tensor]) -> list[Tag]:
    """Each keeps its own samples."""
    given = args[0] if isinstance(args[0], Sequence) else args
    return [aligned(tensor, out.shape, batch) for tensor, out in zip(given, result, strict=True)]


@follows("repeat tile")
def repeat(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The whole tensor is repeated along axes."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis):
        return rows
    axis = rows.axis + result.dim() - x.dim()
    if rows.owners is None:
        return rows.on(axis)
    return SampleAxis(axis, 1, rows.owners.repeat(result.shape[axis] // max(x.shape[rows.axis], 1)))


@follows("repeat_interleave")
def repeat_interleave(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Every index along an axis is repeated, as often or each by a count of its own."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis):
        return rows
    repeats, dim = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    found: Tag = rows
    shape: Sequence[int] = x.shape
    if dim is None:
        shape, dim = [x.numel()], 0
        found = reshaped(rows, x.shape, shape, batch.size)
    if isinstance(found, SampleAxis) and found.axis == dim % len(shape):
        if isinstance(repeats, int) and found.owners is None:
            found = SampleAxis(found.axis, found.inner * repeats)
        else:
            owners = owner_index(found, shape[dim], batch.size, result.device)
            found = SampleAxis(found.axis, 1, owners.repeat_interleave(repeats))
    batch.note(found, result.shape)
    return found


@follows("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split")
def split(batch: Batch, args: Args, kwargs: Kwargs, result: Sequence[Tensor]) -> Any:
    """Pieces one after another along an axis."""
    x, rows = only_first(args, kwargs)
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    if not isinstance(rows, SampleAxis) or rows.axis != dim:
        return rows
    owners = owner_index(rows, x.shape[dim], batch.size, x.device)
    pieces = owners.split([piece.shape[dim] for piece in result])
    return [SampleAxis(dim, 1, piece) for piece in pieces]


@follows("unbind select")
def drop(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """An axis goes, and each of its indices becomes a tensor; the samples' axis would leave one sample without an axis."""
    x, rows = only_first(args, kwargs)
    dim = argument(args, kwargs, 1, "dim", 0) % x.dim()
    if not isinstance(rows, SampleAxis):
        return rows
    return LOST if rows.axis == dim else rows.on(rows.axis - (dim < rows.axis))


@follows("narrow")
def narrow(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A part of an axis."""
    x, rows = only_first(args, kwargs)
    dim = argument(args, kwargs, 1, "dim") % x.dim()
    if not isinstance(rows, SampleAxis) or rows.axis != dim:
        return rows
    start, length = int(argument(args, kwargs, 2, "start")), argument(args, kwargs, 3, "length")
    start %= max(x.shape[dim], 1)
    return SampleAxis(dim, 1, picked(rows, x.shape[dim], slice(start, start + length), batch.size))


@follows("flip fliplr flipud")
def flip(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Axes are turned round."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis) or len(args) + len(kwargs) == 1:
        return rows and LOST
    if rows.axis not in [dim % x.dim() for dim in _rest(args, kwargs, "dims")]:
        return rows
    return SampleAxis(rows.axis, 1, owner_index(rows, x.shape[rows.axis], batch.size, x.device).flip(0))


@follows("roll")
def roll(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Axes are turned as a wheel."""
    x, rows = only_first(args, kwargs)
    shifts, dims = argument(args, kwargs, 1, "shifts"), argument(args, kwargs, 2, "dims")
    if not isinstance(rows, SampleAxis) or dims is None:
        return rows and LOST
    shifts, dims = ([value] if isinstance(value, int) else list(value) for value in (shifts, dims))
    turn = sum(shift for shift, dim in zip(shifts, dims, strict=True) if dim % x.dim() == rows.axis)
    if turn == 0:
        return rows
    return SampleAxis(rows.axis, 1, owner_index(rows, x.shape[rows.axis], batch.size, x.device).roll(turn))


@follows("cat concat concatenate hstack")
def cat(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Tensors one after another along an axis; along the samples' own, all must have samples."""
    given = [tensor for tensor in args[0] if tensor.dim() == result.dim()] if args else list(kwargs["tensors"])
    n = result.dim()
    dim = argument(args, kwargs, 1, "dim")
    if dim is None:
        # Only hstack has no such argument and joins along axis 1; torch.cat's default is 0 and the sizes tell them apart.
        dim = 0 if n == 1 or sum(tensor.shape[0] for tensor in given) == result.shape[0] else 1
    dim %= n
    found: Tag = None
    tags = [tag_of(tensor) for tensor in given]
    if any(isinstance(rows, SampleAxis) and rows.axis == dim for rows in tags):
        if not all(isinstance(rows, SampleAxis) and rows.axis == dim for rows in tags):
            return LOST
        return _joined(
            [rows for rows in tags if isinstance(rows, SampleAxis)], [t.shape[dim] for t in given], batch, result.device
        )
    for rows in tags:
        found = merge(found, rows, result.shape, batch.size)
    return found


def _joined(tags: Sequence[SampleAxis], sizes: Sequence[int], batch: Batch, device: torch.device) -> SampleAxis:
    first = tags[0]
    if all(rows.owners is None and rows.inner == first.inner for rows in tags):
        return first
    return SampleAxis(
        first.axis,
        1,
        torch.cat([owner_index(rows, size, batch.size, device) for rows, size in zip(tags, sizes, strict=True)]),
    )


@follows("stack")
def stack(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Tensors side by side along a new axis."""
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    found: Tag = None
    for tensor in args[0] if args else kwargs["tensors"]:
        rows = tag_of(tensor)
        if isinstance(rows, SampleAxis):
            rows = rows.on(rows.axis + (dim <= rows.axis))
        found = merge(found, rows, result.shape, batch.size)
    return found


@follows("pad constant_pad_nd")
def pad(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The last axes grow; never the samples' own."""
    x, rows = only_first(args, kwargs)
    if not isinstance(rows, SampleAxis):
        return rows
    amounts = argument(args, kwargs, 1, "pad")
    from_end = 2 * (x.dim() - 1 - rows.axis)
    return LOST if any(amounts[from_end : from_end + 2]) else rows


@follows("view_as_complex view_as_real")
def pairs(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The last axis holds the real and the imaginary part."""
    x, rows = only_first(args, kwargs)
    return LOST if isinstance(rows, SampleAxis) and rows.axis >= min(x.dim(), result.dim()) else rows
