"""The segments of one call, and the routed weights that it has used so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..tracking.replay import DivergedError
from ..tracking.sample_axis import SampleAxis, sample_axis_of

Use = tuple[str, int, int]


class Segments:
    """The segments of one call: neighbouring samples of one adapter each.

    The first call of a kind is tracked. If all its routed weights were applied to tensors with the samples along the first
    axis, it is recorded which weights were used, in which order, on tensors of how many dimensions. A later call of the same
    kind that uses the same weights in the same order needs no tracking.

    Args:
        counts: how many samples each segment has, in order.
        expected: the uses that were recorded in an earlier call of the same kind; None for a call that is tracked.

    Attributes:
        size: the number of samples.
        even: how many of the first segments are of one length.
        uses: the uses so far; None once a weight was applied to a tensor with the samples elsewhere.
        outlived: whether the network goes on running after the call, because its forward is a generator.
    """

    def __init__(self, counts: Sequence[int], expected: Sequence[Use] | None = None) -> None:
        self.counts = tuple(counts)
        self.size = sum(counts)
        self.expected = expected
        self.uses: list[Use] | None = []
        self.outlived = False
        self.even = next((i for i, count in enumerate(counts) if count != counts[0]), len(self.counts))
        self._ends = list(accumulate(counts))
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}

    def expect(self, uses: Sequence[Use] | None) -> None:
        """Begin another call: with the uses of an earlier one, or None for a call that is tracked."""
        self.expected, self.uses = uses, []

    def segment_of(self, owners: Tensor) -> Tensor:
        """The segment that each of these samples belongs to."""
        return torch.bucketize(owners.contiguous(), torch.tensor(self._ends, device=owners.device), right=True)

    def lead(self, name: str, x: Tensor) -> bool:
        """Record that a weight is applied to a tensor; return whether the samples are on its first axis, in order.

        Raises:
            DivergedError: if the earlier call used another weight here, or on another kind of tensor.
        """
        uses = self.uses
        if self.expected is not None:
            assert uses is not None
            at = len(uses)
            if at >= len(self.expected) or x.shape[0] % self.size or self.expected[at] != self._use(name, x):
                raise DivergedError
            uses.append(self.expected[at])
            return True
        axis = sample_axis_of(x)
        leads = isinstance(axis, SampleAxis) and axis.axis == 0 and axis.owners is None and x.shape[0] == axis.inner * self.size
        if not leads:
            self.uses = None
        elif uses is not None:
            uses.append(self._use(name, x))
        return leads

    def need_tracking(self) -> None:
        """Record that a weight is used by a function that needs sample axes, so that the call must be tracked.

        Raises:
            DivergedError: if this call is not tracked.
        """
        if self.expected is not None:
            raise DivergedError
        self.uses = None

    def sizes(self, segments: int, tokens: int) -> tuple[int, ...]:
        """How many of so many tokens each of the first segments has."""
        if (segments, tokens) not in self._sizes:
            each = tokens // self.size
            self._sizes[segments, tokens] = tuple(count * each for count in self.counts[:segments])
        return self._sizes[segments, tokens]

    def _use(self, name: str, x: Tensor) -> Use:
        # The first axis of a matrix may be of tokens, whose number differs from call to call; otherwise of beams.
        return name, x.ndim, 0 if x.ndim == 2 else x.shape[0] // self.size
