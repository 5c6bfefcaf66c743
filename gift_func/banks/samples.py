"""Finds the samples of a batch in a call's arguments and in its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec

from .._torch import is_transformed
from ..errors import AdaptError
from ..tracking.layout import set_tag
from ..tracking.sample_axis import SampleAxis, Untracked, sample_axis_of
from .routing import RoutedSlot

_TRANSPARENT = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def check_size(leaves: Sequence[Any], size: int) -> None:
    """Raise `AdaptError` if the first tensor is no batch of so many samples."""
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if first is None:
        raise AdaptError("the bank was given no tensor to run on")
    if first.ndim == 0 or first.shape[0] != size:
        raise AdaptError(
            f"adapters names {size} samples, and the first tensor has shape {tuple(first.shape)}: give one name, or None, for "
            "each index of its leading axis"
        )


def numbers_of(index: Tensor, of: str) -> list[int]:
    """The numbers in an index tensor.

    Raises:
        AdaptError: if it is no index tensor.
    """
    if index.ndim != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise AdaptError(f"indices of {of} are whole numbers of shape (batch,), got {index.dtype} {tuple(index.shape)}")
    return index.tolist()


def leads(tensor: Tensor, size: int) -> bool:
    """Whether a tensor's leading axis is as long as the batch."""
    return tensor.ndim > 0 and tensor.shape[0] == size


def doubtful(leaves: Sequence[Any], size: int) -> set[int]:
    """The places of tensors whose leading axis may have this length by chance: a mask [T, T], states [layers, batch, d]."""
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return {place for place, leaf in tensors[1:] if leads(leaf, size) and leaf.ndim > 1 and leaf.shape[1] == size}


def shared(leaves: Sequence[Any], size: int) -> set[int] | None:
    """The places of tensors that all samples share; None if that is uncertain."""
    if doubtful(leaves, size):
        return None
    return {place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not leads(leaf, size)}


def is_same(leaves: Sequence[Any], order: Sequence[int]) -> bool:
    """Whether the doubtful tensors stay the same in another order of the samples, so that it does not matter what they are."""
    places = doubtful(leaves, len(order))
    if any(is_transformed(leaves[place]) for place in places):
        return False  # the values inside of `torch.vmap` cannot be compared
    return all(torch.equal(leaves[place], leaves[place][list(order)]) for place in places)


def is_opaque(leaf: Any) -> bool:
    """Whether a leaf may contain samples outside of torch's trees (a key-value cache), or refer to them by index."""
    return not isinstance(leaf, _TRANSPARENT)


def is_mixed(leaf: Any) -> bool:
    """Whether a leaf is a tensor whose samples cannot be told apart, or are in no regular order."""
    axis = sample_axis_of(leaf) if isinstance(leaf, Tensor) and leaf.ndim > 0 else None
    return isinstance(axis, Untracked) or (isinstance(axis, SampleAxis) and axis.owners is not None)


def put_back(leaf: Any, axis: SampleAxis | None, back: Tensor | None, size: int) -> Any:
    """An output in the caller's order, without a tag.

    Args:
        leaf: the output.
        axis: its sample axis; None if it does not depend on the batch.
        back: the index of each of the caller's samples in the network's order; None if that is the same.
        size: the number of samples.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    set_tag(leaf, None)
    if back is None or axis is None:
        return leaf
    indices = torch.arange(leaf.shape[axis.axis]).view(-1, size, axis.inner)[:, back].flatten()
    return leaf.index_select(axis.axis, indices.to(leaf.device))


def output_axis(leaf: Any) -> SampleAxis | None:
    """The sample axis of an output; None if it has none.

    Raises:
        AdaptError: if it is a routed weight.
    """
    if isinstance(leaf, RoutedSlot):
        raise AdaptError(f"the network returns its parameter {leaf.weight.name!r}, which differs by sample in this batch")
    axis = sample_axis_of(leaf) if isinstance(leaf, Tensor) else None
    return axis if isinstance(axis, SampleAxis) else None


def kind_of(leaves: Sequence[Any], spec: TreeSpec | None) -> object:
    """A value that differs for calls that may differ in the functions that the network runs; None with opaque arguments.

    It does not depend on lengths, except on which of them are equal or 1.
    """
    if any(map(is_opaque, leaves)):
        return None
    lengths: dict[int, int] = {1: 0}
    kinds = tuple(
        (leaf.dtype, leaf.shape[-1:], *(lengths.setdefault(n, len(lengths)) for n in leaf.shape))
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    )
    return torch.is_grad_enabled(), kinds, repr(spec)


def merged(parts: Sequence[tuple[Any, int]], back: Tensor, fill: int | None = None) -> Any:
    """The outputs of several groups of samples as one output of the batch.

    Args:
        parts: each group's output and number of samples.
        back: the index of each of the caller's samples in the groups' order.
        fill: the token id with which shorter sequences are padded; None if the output has no token ids.

    Raises:
        AdaptError: if the samples of an output cannot be told apart.
    """
    first = parts[0][0]
    if is_opaque(first) and any(leaf is not first for leaf, _ in parts):
        raise AdaptError(
            f"the output holds a {type(first).__name__}, of which it cannot be told what belongs to which sample, and these "
            "adapters cannot share a pass. Call bank[name](...) with the samples of each; of a transformers model, pass "
            "use_cache=False, or let generate return no dict."
        )
    if not isinstance(first, Tensor):
        return first
    if fill is not None and first.ndim == 2 and not first.is_floating_point():
        length = max(leaf.shape[1] for leaf, _ in parts)
        axes = [sample_axis_of(leaf) for leaf, _ in parts]
        parts = [(F.pad(leaf, (0, length - leaf.shape[1]), value=fill), count) for leaf, count in parts]
        for (leaf, _), axis in zip(parts, axes, strict=True):
            set_tag(leaf, axis)
    found = {_axis_and_inner(leaf, count) for leaf, count in parts}
    pair = found.pop()
    if found or pair is None:
        raise AdaptError(
            f"an output of shape {tuple(first.shape)} cannot be told apart by sample, and these adapters cannot share a pass. "
            "Call bank[name](...) with the samples of each; compute what is of the whole batch (a loss) from the outputs."
        )
    dim, inner = pair
    # The axis may have all samples once for each time step, [T * B].
    whole = torch.cat([leaf.unflatten(dim, (-1, count, inner)) for leaf, count in parts], dim=dim + 1)
    return whole.index_select(dim + 1, back.to(whole.device)).flatten(dim, dim + 2)


def _axis_and_inner(leaf: Tensor, count: int) -> tuple[int, int] | None:
    """The sample axis of an output and its number of neighbours for each sample; None if they are unknown."""
    axis = sample_axis_of(leaf)
    if isinstance(axis, SampleAxis) and axis.owners is None and leaf.shape[axis.axis] % (count * axis.inner) == 0:
        return axis.axis, axis.inner
    plain = leaf.ndim > 0 and leaf.shape[0] == count and list(leaf.shape).count(count) == 1
    return (0, 1) if axis is None and plain else None
