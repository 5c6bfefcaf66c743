"""Stacks the low-rank changes of a routed weight, so that a linear layer of a mixed batch is a few products."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import lasting_outside
from ..kernels.mixed_linear import mixed_linear
from ..weights import Dense, LowRank, Weight
from .contiguous import stacked
from .segments import Segments


class SegmentedLowRank:
    """Low-rank changes of one frozen matrix, stacked.

    Args:
        base: W, `(out, in)`.
        changes: the weights of the segments that have a change.

    Attributes:
        left: B, `(K, out, r)`; smaller ranks are padded with zeros.
        right: A, `(K, r, in)`.
        scale: s.
    """

    def __init__(self, base: Tensor, changes: Sequence[LowRank]) -> None:
        self.base = base
        self._changes = tuple(changes)
        lefts, rights = [change.left for change in changes], [change.right for change in changes]
        scales = [change.scale for change in changes]
        rank = max(left.shape[-1] for left in lefts)
        if any(left.shape[-1] != rank for left in lefts):
            lefts = [F.pad(left, (0, rank - left.shape[-1])) for left in lefts]
            rights = [F.pad(right, (0, 0, 0, rank - right.shape[-2])) for right in rights]
        self.scale = float(scales[0])
        if any(scale != scales[0] for scale in scales):
            lefts = [left * (float(scale) / self.scale) for left, scale in zip(lefts, scales, strict=True)]
        self.left, self.right = stacked(lefts), stacked(rights)
        views = _shares_memory(self.left, changes[0].left) and _shares_memory(self.right, changes[0].right)
        self._copied = len(changes) > 1 and not views
        # Views of one memory share their version.
        self._sources = [t for change in (changes[:1] if views else changes) for t in (change.left, change.right)]
        self._versions = self._read_versions()

    @property
    def is_good(self) -> bool:
        """Whether the stack has the present values of the adapters' tensors, and their gradients if gradients are enabled."""
        # Autograd refuses a view of tensors that an optimizer wrote to, though it has the new values. The stacks of an
        # ensemble are no views.
        whole = isinstance(self.left, nn.Parameter) and isinstance(self.right, nn.Parameter)
        return whole or (self._read_versions() == self._versions and not (self._copied and torch.is_grad_enabled()))

    def linear(self, segments: Segments, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ W_n.mT + bias`, where n is the segment; the first axis of x is the sample axis, in order."""
        flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        sizes = segments.sizes(len(self._changes), flat.shape[0])
        y = mixed_linear(flat, self.base, bias, self.left, self.right, self.scale, sizes)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)

    def _read_versions(self) -> list[int]:
        return [tensor._version for tensor in self._sources]

    @staticmethod
    def of(members: Sequence[Weight], transposed: bool = False) -> SegmentedLowRank | None:
        """The stack of weights, or of their transposes; it has gradients and may be cached.

        Returns:
            None for weights of other kinds, or if one without a change comes before one with.
        """
        with lasting_outside(), torch.enable_grad():
            return _stack([member.mT for member in members] if transposed else members)


def _stack(members: Sequence[Weight]) -> SegmentedLowRank | None:
    base: Tensor | None = None
    changes = []
    for member in members:
        plain = member.base if isinstance(member, LowRank) else member
        if (
            not isinstance(plain, Dense)
            or plain.tensor.ndim != 2
            or (base is not None and not _is_same_view(base, plain.tensor))
        ):
            return None
        base = plain.tensor
        if isinstance(member, LowRank):
            fits = member.left.ndim == 2 and member.left.shape[0] == base.shape[0] and not member.dropout
            if not fits or isinstance(member.scale, Tensor) or member.scale == 0 or member.left.dtype != base.dtype:
                return None
            changes.append(member)
    changed = [isinstance(member, LowRank) for member in members]
    if base is None or not changes or any(later and not earlier for earlier, later in pairwise(changed)):
        return None
    return SegmentedLowRank(base, changes)


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _shares_memory(whole: Tensor, part: Tensor) -> bool:
    return whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
