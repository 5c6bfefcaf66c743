"""The one place that calls an `autograd.Function`, which torch leaves untyped and slow to call."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch.autograd import Function

Kind = TypeVar("Kind", bound=type[Function])


def quick(kind: Kind) -> Kind:
    """The class, with the signature of its forward at hand.

    Torch asks `inspect` for it in every call, which looks first for what is set here: 25 of a call's 35 microseconds.
    """
    forward: Any = kind.forward
    forward.__signature__ = inspect.signature(forward)
    return kind


def apply(function: type[Function], *inputs: Any) -> Any:
    """What the function's forward returns, recorded for autograd and `torch.func`."""
    return function.apply(*inputs)
