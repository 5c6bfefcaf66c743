"""The table of rows. One more row is a function `Scale -> Case` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import files, large, small
from .measure import Case, Scale
from .step import METHODS, step

ROWS: dict[str, Callable[[Scale], Case]] = {
    **{f"step/{method}": partial(step, method) for method in METHODS},
    "overhead/call": small.call,
    "overhead/call and backward": small.training_call,
    "adapt/Llama 70B on meta": large.adapt_llama,
    "files/load": files.load,
}
FULL_ONLY = {"adapt/Llama 70B on meta"}
