"""How the samples of one call are divided among adapters, and where in the network their rows were met."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..tracking.replay import DivergedError
from ..tracking.sample_axis import SampleAxis, sample_axis_of

Use = tuple[str, int, int]


class Segments:
    """The runs of one call: neighbouring samples of one adapter each.

    The first call of a kind is followed by tags. Where all its routed weights met rows that lie in front, it is remembered
    which weights met inputs of how many dimensions, and in which order; a later call of the same kind that goes the same
    way, with as many rows in front, needs no tags.

    Args:
        counts: how many samples each run has, in order.
        way: what an earlier call of the same kind met; None to go by tags.

    Attributes:
        size: the number of samples.
        even: how many runs are as long as the first, up to the first that is not.
        met: what this call met so far; None once it met rows that lie elsewhere.
        outlived: whether the network runs on after the call, its forward being a generator.
    """

    def __init__(self, counts: Sequence[int], way: Sequence[Use] | None = None) -> None:
        self.counts = tuple(counts)
        self.size = sum(counts)
        self.way = way
        self.met: list[Use] | None = []
        self.outlived = False
        self.even = next((i for i, count in enumerate(counts) if count != counts[0]), len(self.counts))
        self._ends = list(accumulate(counts))
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}

    def run_of(self, owners: Tensor) -> Tensor:
        """The run that each of these samples belongs to."""
        return torch.bucketize(owners.contiguous(), torch.tensor(self._ends, device=owners.device), right=True)

    def in_front(self, name: str, x: Tensor) -> bool:
        """Whether the samples lie along the first axis of what a weight meets, in order.

        Raises:
            DivergedError: if the call does not go the remembered way.
        """
        met = self.met
        if self.way is not None:
            assert met is not None
            at = len(met)
            if at >= len(self.way) or x.shape[0] % self.size or self.way[at] != self._use(name, x):
                raise DivergedError
            met.append(self.way[at])
            return True
        rows = sample_axis_of(x)
        found = isinstance(rows, SampleAxis) and rows.axis == 0 and rows.owners is None and x.shape[0] == rows.inner * self.size
        if not found:
            self.met = None
        elif met is not None:
            met.append(self._use(name, x))
        return found

    def elsewhere(self) -> None:
        """A weight met rows that do not lie in front, or that must be known by tags."""
        if self.way is not None:
            raise DivergedError
        self.met = None

    def sizes(self, runs: int, tokens: int) -> tuple[int, ...]:
        """How many of `tokens` rows each of the first runs has."""
        found = self._sizes.get((runs, tokens))
        if found is None:
            each = tokens // self.size
            found = self._sizes[runs, tokens] = tuple(count * each for count in self.counts[:runs])
        return found

    def _use(self, name: str, x: Tensor) -> Use:
        # Of a matrix the rows may be tokens, of which each sample has as many as the call has; otherwise beams.
        return name, x.ndim, 0 if x.ndim == 2 else x.shape[0] // self.size
