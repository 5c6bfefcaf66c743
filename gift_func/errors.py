"""The exceptions and warnings of gift_func, and helpers for their messages."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches

import torch


class AdaptError(ValueError):
    """A model, a strategy and a method do not fit together."""


class StateError(ValueError):
    """Adapter tensors do not fit the adapter they are meant for."""


class FileError(ValueError):
    """An adapter file is damaged, of another format, or made for another base."""


class CheckpointError(RuntimeError):
    """Gradient checkpointing is used in a way that would lose an adapter's gradient."""


class BaseChangedWarning(UserWarning):
    """The frozen base's tensors were written to after `adapt`."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most similar to `name`, as the end of an error message."""
    choices = list(known)
    close = get_close_matches(name, choices, cutoff=0.4) or choices[:3]
    if not close:
        return "there are none"
    return "the nearest are " + ", ".join(repr(choice) for choice in close)


_INSIDE = (os.path.dirname(__file__), os.path.dirname(torch.__file__), contextlib.__file__)


def outside() -> int:
    """The `stacklevel` with which the caller's warning names the first line outside of this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
