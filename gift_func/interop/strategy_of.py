"""The strategy that adapts parameters of given names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..methods import WeightMethod
from ..select import Regex
from ..strategy import Strategy


def strategy_of(methods: Mapping[str, WeightMethod]) -> Strategy:
    """A strategy with one rule for each method: it adapts the parameters that are mapped to the method, by their names."""
    names: dict[WeightMethod, list[str]] = {}
    for name, method in methods.items():
        names.setdefault(method, []).append(re.escape(name))
    return Strategy([(Regex("|".join(patterns)), method) for method, patterns in names.items()])
