"""Which of torch's functions tracking has no rule for: a new release of torch shows here what it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import get_testing_overrides

from gift_func.tracking.replay import READERS
from gift_func.tracking.table import TRACKING_RULES
from gift_func.weights.names import METADATA

LIST = Path(__file__).with_name("without_rules.txt")
SPACES = {
    "torch": torch,
    "torch.Tensor": Tensor,
    "torch.nn.functional": F,
    "torch.fft": torch.fft,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
}


def overridable() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions, methods and attributes that a mode sees, by name."""
    seen = get_testing_overrides().keys()
    for prefix, space in SPACES.items():
        for name in dir(space):
            if name.startswith("_") and not (space is Tensor and name.startswith("__")):
                continue
            value = getattr(space, name)
            if space is Tensor and not callable(value):
                value = getattr(value, "__get__", None)
            if callable(value) and value in seen:
                yield f"{prefix}.{name}", value


def test_functions_without_a_rule_are_listed() -> None:
    listed = LIST.read_text().split()
    assert listed == sorted(set(listed)), f"{LIST.name} is not sorted"
    ruled = {
        name: function in TRACKING_RULES or function in METADATA or function in READERS for name, function in overridable()
    }
    new = [name for name, has_rule in ruled.items() if not has_rule and name not in listed]
    assert not new, f"tracking has no rule for these of torch's functions; write rules or list them in {LIST.name}: {new}"
    done = [name for name in listed if ruled.get(name)]
    assert not done, f"these have rules now; take them out of {LIST.name}: {done}"
