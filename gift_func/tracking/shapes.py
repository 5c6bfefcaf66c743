"""Functions that move, slice, join and repeat axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import UNTRACKED, SampleAxis, Tag, merge, owner_index, picked, reshaped
from .table import Args, BatchInfo, Kwargs, aligned, argument, axis_rule_for, rule_for, tag_of


def _remaining(args: Args, kwargs: Kwargs, name: str) -> list[int]:
    """Sizes or axes, given as one sequence or one by one."""
    found = args[1:] or kwargs[name]
    if isinstance(found, int):
        return [found]
    return list(found[0] if isinstance(found[0], Sequence) else found)


@rule_for("view reshape flatten unflatten ravel view_as reshape_as _unsafe_view", tolerant=True)
def track_reshape(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A reshape, in which the elements keep their order."""
    tag, old, new = tag_of(args[0]), args[0].shape, result.shape
    if not isinstance(tag, SampleAxis) or old[: tag.axis + 1] == new[: tag.axis + 1]:
        return tag
    found = reshaped(tag, old, new, batch.size)
    batch.note(found, result.shape)
    return found


@axis_rule_for("squeeze")
def track_squeeze(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Axes of size 1 are removed; if the sample axis is, the result is untracked."""
    dims = argument(args, kwargs, 1, "dim", tuple(range(x.dim())))
    gone = {dim % x.dim() for dim in (dims if isinstance(dims, Sequence) else [dims]) if x.shape[dim] == 1}
    return UNTRACKED if tag.axis in gone else tag.on(tag.axis - sum(dim < tag.axis for dim in gone))


@axis_rule_for("unsqueeze")
def track_unsqueeze(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A new axis of size 1."""
    dim = argument(args, kwargs, 1, "dim") % result.dim()
    return tag.on(tag.axis + (dim <= tag.axis))


@axis_rule_for("transpose swapaxes swapdims t adjoint .T .mT .H .mH")
def track_transpose(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Two axes are swapped; without arguments the last two, or all axes are reversed."""
    n = x.dim()
    if len(args) + len(kwargs) == 1:
        # .T reverses all axes and the other functions swap the last two, which differs for more than two axes only.
        if n > 2 and result.shape == x.shape[::-1] and result.stride() == x.stride()[::-1]:
            return tag.on(n - 1 - tag.axis)
        pair = (n - 2, n - 1) if n > 1 else (0, 0)
    else:
        first = kwargs.get("dim0", kwargs.get("axis0"))
        second = kwargs.get("dim1", kwargs.get("axis1"))
        pair = (args[1] if len(args) > 1 else first) % n, (args[2] if len(args) > 2 else second) % n
    return tag.on({pair[0]: pair[1], pair[1]: pair[0]}.get(tag.axis, tag.axis))


@axis_rule_for("permute")
def track_permute(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The axes are put in a given order."""
    order = [dim % x.dim() for dim in _remaining(args, kwargs, "dims")]
    return tag.on(order.index(tag.axis))


@axis_rule_for("movedim moveaxis")
def track_movedim(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Some axes are moved; the others keep their order."""
    moved = [dims if isinstance(dims, Sequence) else [dims] for dims in (*args[1:], *kwargs.values())]
    source, destination = ([dim % x.dim() for dim in dims] for dims in moved)
    if tag.axis in source:
        return tag.on(destination[source.index(tag.axis)])
    left = [dim for dim in range(x.dim()) if dim not in destination]
    return tag.on(left[sum(dim not in source for dim in range(tag.axis))])


@rule_for("expand expand_as broadcast_to", tolerant=True)
def track_expand(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The first argument is broadcast; of a second one only the shape is used."""
    return aligned(args[0], result.shape, batch)


@rule_for("broadcast_tensors")
def track_broadcast_all(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Sequence[Tensor]) -> list[Tag]:
    """Each tensor keeps its own samples."""
    given = args[0] if isinstance(args[0], Sequence) else args
    return [aligned(tensor, out.shape, batch) for tensor, out in zip(given, result, strict=True)]


@axis_rule_for("repeat tile")
def track_repeat(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The whole tensor is repeated along axes."""
    axis = tag.axis + result.dim() - x.dim()
    if tag.owners is None:
        return tag.on(axis)
    return SampleAxis(axis, 1, tag.owners.repeat(result.shape[axis] // max(x.shape[tag.axis], 1)))


@axis_rule_for("repeat_interleave")
def track_repeat_interleave(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Each index along an axis is repeated, all equally often or each by its own count."""
    repeats, dim = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    found: Tag = tag
    shape: Sequence[int] = x.shape
    if dim is None:
        shape, dim = [x.numel()], 0
        found = reshaped(tag, x.shape, shape, batch.size)
    if isinstance(found, SampleAxis) and found.axis == dim % len(shape):
        if isinstance(repeats, int) and found.owners is None:
            found = SampleAxis(found.axis, found.inner * repeats)
        else:
            owners = owner_index(found, shape[dim], batch.size, result.device)
            found = SampleAxis(found.axis, 1, owners.repeat_interleave(repeats))
    batch.note(found, result.shape)
    return found


@axis_rule_for("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split")
def track_split(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Sequence[Tensor]) -> Any:
    """Consecutive pieces of an axis."""
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    if tag.axis != dim:
        return tag
    owners = owner_index(tag, x.shape[dim], batch.size, x.device)
    pieces = owners.split([piece.shape[dim] for piece in result])
    return [SampleAxis(dim, 1, piece) for piece in pieces]


@axis_rule_for("unbind select")
def track_drop(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """Each index of an axis becomes a tensor without that axis; if it is the sample axis, the results are untracked."""
    dim = argument(args, kwargs, 1, "dim", 0) % x.dim()
    return UNTRACKED if tag.axis == dim else tag.on(tag.axis - (dim < tag.axis))


@axis_rule_for("narrow")
def track_narrow(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A part of an axis."""
    dim = argument(args, kwargs, 1, "dim") % x.dim()
    if tag.axis != dim:
        return tag
    start, length = int(argument(args, kwargs, 2, "start")), argument(args, kwargs, 3, "length")
    start %= max(x.shape[dim], 1)
    return SampleAxis(dim, 1, picked(tag, x.shape[dim], slice(start, start + length), batch.size))


@axis_rule_for("flip fliplr flipud")
def track_flip(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Axes are reversed."""
    if len(args) + len(kwargs) == 1:
        return UNTRACKED
    if tag.axis not in [dim % x.dim() for dim in _remaining(args, kwargs, "dims")]:
        return tag
    return SampleAxis(tag.axis, 1, owner_index(tag, x.shape[tag.axis], batch.size, x.device).flip(0))


@axis_rule_for("roll")
def track_roll(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Axes are shifted cyclically."""
    shifts, dims = argument(args, kwargs, 1, "shifts"), argument(args, kwargs, 2, "dims")
    if dims is None:
        return UNTRACKED
    shifts, dims = ([value] if isinstance(value, int) else list(value) for value in (shifts, dims))
    turn = sum(shift for shift, dim in zip(shifts, dims, strict=True) if dim % x.dim() == tag.axis)
    if turn == 0:
        return tag
    return SampleAxis(tag.axis, 1, owner_index(tag, x.shape[tag.axis], batch.size, x.device).roll(turn))


@rule_for("cat concat concatenate hstack")
def track_cat(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Tensors are joined along an axis; if it is the sample axis of one, it must be that of all."""
    given = [tensor for tensor in args[0] if tensor.dim() == result.dim()] if args else list(kwargs["tensors"])
    n = result.dim()
    dim = argument(args, kwargs, 1, "dim")
    if dim is None:
        # hstack has no such argument and joins along axis 1, torch.cat's default is 0; the sizes say which it was.
        dim = 0 if n == 1 or sum(tensor.shape[0] for tensor in given) == result.shape[0] else 1
    dim %= n
    tags = [tag_of(tensor) for tensor in given]
    joined = [tag for tag in tags if isinstance(tag, SampleAxis) and tag.axis == dim]
    if joined:
        if len(joined) < len(tags):
            return UNTRACKED
        if all(tag.owners is None and tag.inner == joined[0].inner for tag in joined):
            return joined[0]
        owners = [owner_index(tag, x.shape[dim], batch.size, result.device) for tag, x in zip(joined, given, strict=True)]
        return SampleAxis(dim, 1, torch.cat(owners))
    found: Tag = None
    for tag in tags:
        found = merge(found, tag, result.shape, batch.size)
    return found


@rule_for("stack")
def track_stack(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Tensors are joined along a new axis."""
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    found: Tag = None
    for tensor in args[0] if args else kwargs["tensors"]:
        tag = tag_of(tensor)
        if isinstance(tag, SampleAxis):
            tag = tag.on(tag.axis + (dim <= tag.axis))
        found = merge(found, tag, result.shape, batch.size)
    return found


@axis_rule_for("pad constant_pad_nd")
def track_pad(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The last axes are padded; the sample axis must not be."""
    amounts = argument(args, kwargs, 1, "pad")
    from_end = 2 * (x.dim() - 1 - tag.axis)
    return UNTRACKED if any(amounts[from_end : from_end + 2]) else tag


@axis_rule_for("view_as_complex view_as_real")
def track_pairs(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The last axis holds the real and the imaginary part."""
    return UNTRACKED if tag.axis >= min(x.dim(), result.dim()) else tag
