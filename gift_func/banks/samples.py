"""The samples of a batch among a call's arguments and in its outputs."""

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

_PLAIN = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def check_size(leaves: Sequence[Any], size: int) -> None:
    """Refuse arguments whose first tensor is no batch of so many samples."""
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
        AdaptError: if it is none.
    """
    if index.ndim != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise AdaptError(f"indices of {of} are whole numbers of shape (batch,), got {index.dtype} {tuple(index.shape)}")
    found: list[int] = index.tolist()
    return found


def leads(tensor: Tensor, size: int) -> bool:
    """Whether a tensor's leading axis is as long as the batch."""
    return tensor.ndim > 0 and tensor.shape[0] == size


def doubtful(leaves: Sequence[Any], size: int) -> set[int]:
    """Tensors whose leading axis may be of the batch's length by chance: a mask [T, T], states [layers, batch, d]."""
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return {place for place, leaf in tensors[1:] if leads(leaf, size) and leaf.ndim > 1 and leaf.shape[1] == size}


def shared(leaves: Sequence[Any], size: int) -> set[int] | None:
    """Tensors that all samples share; None if that cannot be told."""
    if doubtful(leaves, size):
        return None
    return {place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not leads(leaf, size)}


def is_same(leaves: Sequence[Any], order: Sequence[int]) -> bool:
    """Whether the doubtful tensors are the same in another order of the samples, so that it does not matter what they are."""
    places = doubtful(leaves, len(order))
    if any(is_transformed(leaves[place]) for place in places):
        return False  # values of a batch that `torch.vmap` hides cannot be compared
    return all(torch.equal(leaves[place], leaves[place][list(order)]) for place in places)


def is_opaque(leaf: Any) -> bool:
    """Whether a leaf may hold samples where no tree finds them (a key-value cache), or ask for them by number."""
    return not isinstance(leaf, _PLAIN)


def is_mixed(leaf: Any) -> bool:
    """Whether a leaf is a tensor whose samples cannot be told apart by a pattern."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and _lost(leaf)


def _lost(leaf: Tensor) -> bool:
    rows = sample_axis_of(leaf)
    return isinstance(rows, Untracked) or (isinstance(rows, SampleAxis) and rows.owners is not None)


def put_back(leaf: Any, rows: SampleAxis | None, back: Tensor | None, size: int) -> Any:
    """An output in the caller's order, without a tag.

    Args:
        leaf: the output.
        rows: where its samples lie; None if it is none of the samples.
        back: for each sample of the caller's its place in the network's order; None if that is the same.
        size: the number of samples.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    set_tag(leaf, None)
    return leaf if back is None or rows is None else _reordered(leaf, rows, back, size)


def rows_out(leaf: Any) -> SampleAxis | None:
    """Where the samples lie in an output; None if it is none of the samples.

    Raises:
        AdaptError: if it is a parameter that differs by sample.
    """
    if isinstance(leaf, RoutedSlot):
        raise AdaptError(f"the network returns its parameter {leaf.weight.name!r}, which differs by sample in this batch")
    rows = sample_axis_of(leaf) if isinstance(leaf, Tensor) else None
    return rows if isinstance(rows, SampleAxis) else None


def kind_of(leaves: Sequence[Any], spec: TreeSpec | None) -> object:
    """What tells calls apart that may go different ways through the network; None for one with opaque arguments.

    Lengths differ from call to call; which of them are equal, or 1, is part of it.
    """
    if any(map(is_opaque, leaves)):
        return None
    lengths: dict[int, int] = {1: 0}
    told = tuple(
        (leaf.dtype, leaf.shape[-1:], *(lengths.setdefault(n, len(lengths)) for n in leaf.shape))
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    )
    return torch.is_grad_enabled(), told, repr(spec)


def _reordered(leaf: Tensor, rows: SampleAxis, back: Tensor, size: int) -> Tensor:
    places = torch.arange(leaf.shape[rows.axis]).view(-1, size, rows.inner)[:, back].flatten()
    return leaf.index_select(rows.axis, places.to(leaf.device))


def merged(parts: Sequence[tuple[Any, int]], back: Tensor, fill: int | None = None) -> Any:
    """An output of several groups of samples as that of the batch.

    Args:
        parts: each group's, and how many samples it has.
        back: for each sample of the caller's its place in the groups' order.
        fill: what ends a row of token ids that is shorter than those of other groups; None where the output is no such.

    Raises:
        AdaptError: if it cannot be told which of it belongs to which sample.
    """
    first = parts[0][0]
    if not isinstance(first, Tensor):
        return _the_one(parts)
    if fill is not None and first.ndim == 2 and not first.is_floating_point():
        length = max(leaf.shape[1] for leaf, _ in parts)
        rows = [sample_axis_of(leaf) for leaf, _ in parts]
        parts = [(F.pad(leaf, (0, length - leaf.shape[1]), value=fill), count) for leaf, count in parts]
        for (leaf, _), known in zip(parts, rows, strict=True):
            set_tag(leaf, known)
    found = {_rows_of_part(leaf, count) for leaf, count in parts}
    pair = found.pop()
    if found or pair is None:
        raise AdaptError(
            f"an output of shape {tuple(first.shape)} cannot be told apart by sample, and these adapters cannot share a pass. "
            "Call bank[name](...) with the samples of each; compute what is of the whole batch (a loss) from the outputs."
        )
    axis, inner = pair
    # Time-major rows [T * B] start anew with each step.
    whole = torch.cat([leaf.unflatten(axis, (-1, count, inner)) for leaf, count in parts], dim=axis + 1)
    return whole.index_select(axis + 1, back.to(whole.device)).flatten(axis, axis + 2)


def _the_one(parts: Sequence[tuple[Any, int]]) -> Any:
    first = parts[0][0]
    if is_opaque(first) and any(leaf is not first for leaf, _ in parts):
        raise AdaptError(
            f"the output holds a {type(first).__name__}, of which it cannot be told what belongs to which sample, and these "
            "adapters cannot share a pass. Call bank[name](...) with the samples of each; of a transformers model, pass "
            "use_cache=False, or let generate return no dict."
        )
    return first


def _rows_of_part(leaf: Tensor, count: int) -> tuple[int, int] | None:
    """Axis and number of neighbours of each sample in an output; None if they cannot be told."""
    rows = sample_axis_of(leaf)
    if isinstance(rows, SampleAxis) and rows.owners is None and leaf.shape[rows.axis] % (count * rows.inner) == 0:
        return rows.axis, rows.inner
    plain = leaf.ndim > 0 and leaf.shape[0] == count and list(leaf.shape).count(count) == 1
    return (0, 1) if rows is None and plain else None
