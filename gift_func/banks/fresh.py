"""A new adapter for a bank, made from a strategy without a copy of the network."""

from __future__ import annotations

from typing import Any

import torch

from ..adapt import adapt
from ..gift_protocol import is_protocol
from ..initialise import Initial, parts_of
from ..methods import Graft
from ..network.frozen_base import FrozenBase
from ..strategy import Strategy
from .entry import Entry


def fresh(base: FrozenBase, strategy: Any, generator: torch.Generator | None) -> Entry:
    """The adapter that `adapt` would make; its network is not copied unless the strategy brings modules of its own.

    Raises:
        AdaptError: as of `adapt`.
    """
    if is_protocol(strategy):
        return Entry.of(adapt(base, strategy, generator=generator))
    rules = Strategy.of(strategy)
    placements = rules.place(base)
    if any(isinstance(placement.method, Graft) for placement in placements):
        return Entry.of(adapt(base, rules, generator=generator))
    parts, tensors = parts_of(placements, Initial(generator), ())
    return Entry(base, tuple(parts), rules, tensors, {}, None)
