"""A new adapter for a bank, made from a strategy without a copy of the network."""

from __future__ import annotations

from typing import Any

import torch

from ..adapt import adapt
from ..gift_protocol import is_protocol
from ..initialise import Initial, parts_of
from ..network.frozen_base import FrozenBase
from ..strategy import Strategy
from .entry import Adapter


def fresh(base: FrozenBase, strategy: Any, generator: torch.Generator | None) -> Adapter:
    """The adapter that `adapt` would make; its network is not copied unless the strategy brings modules of its own.

    Raises:
        AdaptError: as of `adapt`.
    """
    if is_protocol(strategy):
        return Adapter.of(adapt(base, strategy, generator=generator))
    rules = Strategy.of(strategy)
    placements, added = rules.place(base)
    if added:
        return Adapter.of(adapt(base, rules, generator=generator))
    parts, tensors = parts_of(placements, Initial(generator), ())
    return Adapter(base, tuple(parts), rules, tensors, {}, None)
