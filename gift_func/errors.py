"""What gift_func raises and warns with: ordinary ValueErrors with a name that can be caught."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches

import torch


class AdaptError(ValueError):
    """A model, a strategy or a method that do not fit together."""


class StateError(ValueError):
    """Adapter tensors that do not fit the adapter they are meant for."""


class FileError(ValueError):
    """An adapter file that is damaged, foreign, or made for another base."""


class CheckpointError(RuntimeError):
    """Gradient checkpointing used in a way that would lose an adapter's gradient."""


class BaseChangedWarning(UserWarning):
    """The frozen base's tensors were written to after `adapt`."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as the end of an error's sentence."""
    choices = list(known)
    close = get_close_matches(name, choices, n=count, cutoff=0.4) or choices[:count]
    if not close:
        return "there are none"
    return "the nearest are " + ", ".join(repr(choice) for choice in close)


_INSIDE = (os.path.dirname(__file__), os.path.dirname(torch.__file__), contextlib.__file__)


def outside() -> int:
    """The `stacklevel` with which a warning of the caller names the first line outside of this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
