"""The samples of a batch among a call's arguments and in its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..errors import AdaptError
from .following.layout import put
from .routed import RoutedSlot
from .rows import Lost, Rows, rows_of


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


def is_opaque(leaf: Any) -> bool:
    """Whether a leaf may hold tensors where no tree finds them: a key-value cache, say."""
    return not isinstance(
        leaf, (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    ) and hasattr(leaf, "__dict__")


def is_mixed(leaf: Any) -> bool:
    """Whether a leaf is a tensor whose samples cannot be told apart by a pattern."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and _lost(leaf)


def _lost(leaf: Tensor) -> bool:
    rows = rows_of(leaf)
    return isinstance(rows, Lost) or (isinstance(rows, Rows) and rows.owners is not None)


def put_back(leaf: Any, rows: Rows | None, back: Tensor | None, size: int) -> Any:
    """An output in the caller's order, without a tag.

    Args:
        leaf: the output.
        rows: where its samples lie; None if it is none of the samples.
        back: for each sample of the caller's its place in the network's order; None if that is the same.
        size: the number of samples.
    """
    if not isinstance(leaf, Tensor):
        if back is not None and hasattr(leaf, "reorder_cache"):
            leaf.reorder_cache(back)
        return leaf
    put(leaf, None)
    return leaf if back is None or rows is None else _reordered(leaf, rows, back, size)


def rows_out(leaf: Any) -> Rows | None:
    """Where the samples lie in an output; None if it is none of the samples.

    Raises:
        AdaptError: if it is a parameter that differs by sample.
    """
    if isinstance(leaf, RoutedSlot):
        raise AdaptError(f"the network returns its parameter {leaf.weight.name!r}, which differs by sample in this batch")
    rows = rows_of(leaf) if isinstance(leaf, Tensor) else None
    return rows if isinstance(rows, Rows) else None


def kind_of(leaves: Sequence[Any], spec: TreeSpec | None) -> object:
    """What tells calls apart that may go different ways through the network; None for one with opaque arguments."""
    if any(map(is_opaque, leaves)):
        return None
    told = tuple((leaf.ndim, leaf.dtype, leaf.shape[-1:]) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return torch.is_grad_enabled(), told, repr(spec)


def _reordered(leaf: Tensor, rows: Rows, back: Tensor, size: int) -> Tensor:
    places = torch.arange(leaf.shape[rows.axis]).view(-1, size, rows.inner)[:, back].flatten()
    return leaf.index_select(rows.axis, places.to(leaf.device))


def merged(parts: Sequence[tuple[Any, int]], back: Tensor) -> Any:
    """An output of several groups of samples as that of the batch."""
    first = parts[0][0]
    if not isinstance(first, Tensor):
        return first
    found = {_rows_of_part(leaf, count) for leaf, count in parts}
    if len(found) != 1 or None in found:
        raise AdaptError(
            f"an output of shape {tuple(first.shape)} cannot be told apart by sample, and these adapters cannot share a pass. "
            "Call bank[name](...) with the samples of each; compute what is of the whole batch (a loss) from the outputs."
        )
    axis, inner = next(pair for pair in found if pair is not None)
    whole = torch.cat([leaf for leaf, _ in parts], dim=axis)
    return _reordered(whole, Rows(axis, inner), back, back.numel())


def _rows_of_part(leaf: Tensor, count: int) -> tuple[int, int] | None:
    """Axis and number of neighbours of each sample in an output; None if they cannot be told."""
    rows = rows_of(leaf)
    if isinstance(rows, Rows) and rows.owners is None and leaf.shape[rows.axis] == count * rows.inner:
        return rows.axis, rows.inner
    plain = leaf.ndim > 0 and leaf.shape[0] == count and list(leaf.shape).count(count) == 1
    return (0, 1) if rows is None and plain else None
