"""Where the samples of a batch lie in a tensor: a tensor's tag, and what becomes of one when its axis is cut or reshaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

KEY = "_gift_func_rows"


@dataclass(frozen=True, eq=False, slots=True)
class SampleAxis:
    """Where a tensor's samples lie.

    Index j along `axis` belongs to sample `(j // inner) % batch`, or to `owners[j]` where owners are given.

    Attributes:
        axis: the axis along which the samples lie, counted from the left.
        inner: how many neighbours along the axis belong to one sample. The axis has `outer * batch * inner` indices;
            a time-major `[T * B]` has inner 1 and outer T.
        owners: int64 `[size of the axis]`, the sample of each index, where no such pattern holds; inner is then unused.

    Example:
        >>> from gift_func.tracking.sample_axis import SampleAxis, owner_index
        >>> owner_index(SampleAxis(0, 2), 6, 3).tolist()
        [0, 0, 1, 1, 2, 2]
    """

    axis: int
    inner: int
    owners: Tensor | None = None

    def on(self, axis: int) -> SampleAxis:
        """The same samples along another axis."""
        return self if axis == self.axis else SampleAxis(axis, self.inner, self.owners)


@dataclass(frozen=True)
class Untracked:
    """The tag of a tensor that was made from the batch but whose samples cannot be told apart.

    Attributes:
        function: the first function that has no rule, or that mixed the samples: `"torch.fft.fft"`.
    """

    function: str


LOST = Untracked("")
"""What a rule answers when samples are mixed; the mode puts the function's name to it."""

Tag: TypeAlias = SampleAxis | Untracked | None


def rows_of(tensor: Tensor) -> Tag:
    """A tensor's tag: its rows, that they were lost, or None for one that the batch never touched."""
    found: Tag = tensor.__dict__.get(KEY)
    return found


def tag(tensor: Tensor, rows: Tag) -> Tensor:
    """An alias of a tensor that carries a tag; the tensor object given is not marked.

    Example:
        >>> import torch
        >>> from gift_func.tracking.sample_axis import SampleAxis, rows_of, tag
        >>> x = torch.ones(3, 4)
        >>> rows_of(tag(x, SampleAxis(0, 1))), rows_of(x)
        (SampleAxis(axis=0, inner=1, owners=None), None)
    """
    alias = tensor.view_as(tensor)
    put(alias, rows)
    return alias


def put(tensor: Tensor, rows: Tag) -> None:
    """Write a tensor's tag, or take it away."""
    if rows is not None:
        tensor.__dict__[KEY] = rows
    elif KEY in tensor.__dict__:
        del tensor.__dict__[KEY]


def owner_index(rows: SampleAxis, size: int, batch: int, device: torch.device | str | None = None) -> Tensor:
    """The sample to which each index along the axis belongs.

    Args:
        rows: where the samples lie.
        size: of the axis.
        batch: the number of samples.
        device: of the answer.

    Returns:
        int64 `[size]`.
    """
    if rows.owners is not None:
        return rows.owners.to(device=device)
    return torch.arange(size, device=device).div_(rows.inner, rounding_mode="floor").remainder_(batch)


def agree(a: SampleAxis, b: SampleAxis, size: int, batch: int) -> bool:
    """Whether two tags give every index along an axis of a size the same sample; their axes are not compared."""
    if batch == 1 or a is b:
        return True
    if a.owners is None and b.owners is None:
        return a.inner == b.inner
    if a.owners is b.owners:
        return True
    device = (a.owners if a.owners is not None else b.owners).device  # type: ignore[union-attr]  # one of them is given
    return torch.equal(owner_index(a, size, batch, device), owner_index(b, size, batch, device))


def merge(a: Tag, b: Tag, shape: Sequence[int], batch: int) -> Tag:
    """The tag of a result of a shape that depends on two things, each with its samples where its tag says."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Untracked) or isinstance(b, Untracked):
        return LOST
    if batch == 1 or (a.axis == b.axis and agree(a, b, shape[a.axis], batch)):
        return b if a.owners is not None and b.owners is None else a
    return LOST


def placed(rows: SampleAxis, axis: int, size: int, new_size: int, batch: int) -> Tag:
    """A tag moved to another axis, which broadcasting may have grown from 1."""
    if size == new_size:
        return rows.on(axis)
    if size != 1:
        return LOST
    if batch == 1:
        return SampleAxis(axis, new_size)
    owner = owner_index(rows, 1, batch)
    return SampleAxis(axis, 1, owner.expand(new_size))


def picked(rows: SampleAxis, size: int, index: Tensor | slice, batch: int) -> Tensor:
    """The owners of the indices that are picked from the axis; of the index's own shape."""
    if isinstance(index, slice):
        return owner_index(rows, size, batch)[index]
    if rows.owners is None:
        return index.remainder(size).div_(rows.inner, rounding_mode="floor").remainder_(batch).long()
    return rows.owners.to(index.device)[index]


def reshaped(rows: SampleAxis, shape: Sequence[int], new_shape: Sequence[int], batch: int) -> Tag:
    """The tag after the elements, in row-major order, are given another shape.

    In a regular layout `inner * prod(shape[axis + 1:])` consecutive elements belong to one sample. An axis of the new
    shape holds the samples if such a block is a whole number of its indices, and the samples start anew with it.
    """
    axis = rows.axis
    if tuple(shape) == tuple(new_shape):
        return rows
    before, size, after = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    candidates = range(len(new_shape))
    # An axis that is there as before comes first: with one sample, or no elements, others would do as well.
    same = [
        a for a in candidates if new_shape[a] == size and prod(new_shape[:a]) == before and prod(new_shape[a + 1 :]) == after
    ]
    if same:
        return rows.on(same[0])
    if before * size * after == 0 or prod(new_shape) != before * size * after:
        return LOST
    if rows.owners is not None:
        return _reshaped_owners(rows.owners, before, after, new_shape)
    block = rows.inner * after
    for a in candidates:
        suffix = prod(new_shape[a + 1 :])
        if block % suffix == 0:
            inner = block // suffix
            if new_shape[a] % (inner * batch) == 0:
                return SampleAxis(a, inner)
    return LOST


def _reshaped_owners(owners: Tensor, before: int, after: int, new_shape: Sequence[int]) -> Tag:
    flat = owners.repeat(before)
    for a, size in enumerate(new_shape):
        suffix = prod(new_shape[a + 1 :])
        if suffix % after == 0:
            fine = flat
        elif after % suffix == 0:
            fine = flat.repeat_interleave(after // suffix)
        else:
            continue
        table = fine.reshape(prod(new_shape[:a]), size, -1)
        found = table[0, :, 0]
        if bool((table == found[:, None]).all()):
            return SampleAxis(a, 1, found)
    return LOST
