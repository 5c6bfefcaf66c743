"""A tensor's tag, which says where the batch's samples lie in it, and how indexing and reshaping change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

TAG_KEY = "_gift_func_tag"


@dataclass(frozen=True, eq=False, slots=True)
class SampleAxis:
    """The axis of a tensor along which the batch's samples lie.

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
    """The tag of a tensor that was made from the batch and whose samples cannot be told apart.

    Attributes:
        function: the first function that has no rule, or that mixed the samples: `"torch.fft.fft"`.
    """

    function: str


UNTRACKED = Untracked("")
"""What a rule returns when samples are mixed; the mode adds the function's name."""

Tag: TypeAlias = SampleAxis | Untracked | None


def sample_axis_of(tensor: Tensor) -> Tag:
    """A tensor's tag: its sample axis, `Untracked`, or None if it was not made from the batch."""
    found: Tag = tensor.__dict__.get(TAG_KEY)
    return found


def tag(tensor: Tensor, value: Tag) -> Tensor:
    """An alias of a tensor, with a tag; the tensor object given is not tagged.

    Example:
        >>> import torch
        >>> from gift_func.tracking.sample_axis import SampleAxis, sample_axis_of, tag
        >>> x = torch.ones(3, 4)
        >>> sample_axis_of(tag(x, SampleAxis(0, 1))), sample_axis_of(x)
        (SampleAxis(axis=0, inner=1, owners=None), None)
    """
    alias = tensor.view_as(tensor)
    set_tag(alias, value)
    return alias


def set_tag(tensor: Tensor, value: Tag) -> None:
    """Set a tensor's tag, or remove it."""
    if value is not None:
        tensor.__dict__[TAG_KEY] = value
    elif TAG_KEY in tensor.__dict__:
        del tensor.__dict__[TAG_KEY]


def owner_index(samples: SampleAxis, size: int, batch: int, device: torch.device | str | None = None) -> Tensor:
    """The sample to which each index along an axis of this size belongs, int64 `[size]`."""
    if samples.owners is not None:
        return samples.owners.to(device=device)
    return torch.arange(size, device=device).div_(samples.inner, rounding_mode="floor").remainder_(batch)


def agree(a: SampleAxis, b: SampleAxis, size: int, batch: int) -> bool:
    """Whether two sample axes of this size have the same sample at each index; which axes they are is not compared."""
    if batch == 1 or a is b:
        return True
    if a.owners is None and b.owners is None:
        return a.inner == b.inner
    if a.owners is b.owners:
        return True
    device = (a.owners if a.owners is not None else b.owners).device  # type: ignore[union-attr]  # one of them is given
    return torch.equal(owner_index(a, size, batch, device), owner_index(b, size, batch, device))


def merge(a: Tag, b: Tag, shape: Sequence[int], batch: int) -> Tag:
    """The tag of a result of this shape that is computed from two tensors, whose tags in the result's axes are given."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Untracked) or isinstance(b, Untracked):
        return UNTRACKED
    if batch == 1 or (a.axis == b.axis and agree(a, b, shape[a.axis], batch)):
        return b if a.owners is not None and b.owners is None else a
    return UNTRACKED


def placed(samples: SampleAxis, axis: int, size: int, new_size: int, batch: int) -> Tag:
    """The same samples along another axis, which broadcasting may have expanded from size 1."""
    if size == new_size:
        return samples.on(axis)
    if size != 1:
        return UNTRACKED
    if batch == 1:
        return SampleAxis(axis, new_size)
    owner = owner_index(samples, 1, batch)
    return SampleAxis(axis, 1, owner.expand(new_size))


def picked(samples: SampleAxis, size: int, index: Tensor | slice, batch: int) -> Tensor:
    """The owners of the indices that an index selects from the axis; of the index's own shape."""
    if isinstance(index, slice):
        return owner_index(samples, size, batch)[index]
    if samples.owners is None:
        return index.remainder(size).div_(samples.inner, rounding_mode="floor").remainder_(batch).long()
    return samples.owners.to(index.device)[index]


def reshaped(samples: SampleAxis, shape: Sequence[int], new_shape: Sequence[int], batch: int) -> Tag:
    """The tag after a reshape, which keeps the elements in row-major order.

    In a regular layout `inner * prod(shape[axis + 1:])` consecutive elements belong to one sample. An axis of the new
    shape is the sample axis if such a block is a whole number of its indices, and the samples begin again with it.
    """
    axis = samples.axis
    if tuple(shape) == tuple(new_shape):
        return samples
    before, size, after = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    candidates = range(len(new_shape))
    # An axis that is there as before comes first: with one sample, or no elements, others would do as well.
    same = [
        a for a in candidates if new_shape[a] == size and prod(new_shape[:a]) == before and prod(new_shape[a + 1 :]) == after
    ]
    if same:
        return samples.on(same[0])
    if before * size * after == 0 or prod(new_shape) != before * size * after:
        return UNTRACKED
    if samples.owners is not None:
        return _reshaped_owners(samples.owners, before, after, new_shape)
    block = samples.inner * after
    for a in candidates:
        suffix = prod(new_shape[a + 1 :])
        if block % suffix == 0:
            inner = block // suffix
            if new_shape[a] % (inner * batch) == 0:
                return SampleAxis(a, inner)
    return UNTRACKED


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
    return UNTRACKED
