"""The progress of a long run: tqdm's bar, or plain lines if tqdm is not installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any, Self


class Progress:
    """A progress bar for so many steps, of which nothing is seen if it is not `shown`."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._done, self._shown = total, 0, shown
        self._bar: Any = None
        self._last_printed = self._start = time.monotonic()
        if shown and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="step", mininterval=0.3)
        elif shown:
            print("(a progress bar needs tqdm: pip install tqdm)", file=sys.stderr)

    def update(self, steps: int, text: str) -> None:
        """Add steps that were done."""
        self._done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
        elif self._shown and (time.monotonic() - self._last_printed > 2 or self._done == self._total):
            self._last_printed = time.monotonic()
            print(f"step {self._done} of {self._total}, {self._last_printed - self._start:.0f} s: {text}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
