"""A shelf: values that are read when first asked for, kept up to a number of bytes, the least recently used dropped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class StoreCounters:
    """What a store did so far, and what it keeps now.

    Attributes:
        hits: uses that found their adapter in memory, or another thread about to read it.
        misses: uses that read a file.
        evictions: adapters dropped to keep within the budget.
        resident: adapters in memory.
        bytes: of their tensors.
    """

    hits: int
    misses: int
    evictions: int
    resident: int
    bytes: int


@dataclass(frozen=True)
class Loaded(Generic[Value]):
    """A value that was read.

    Attributes:
        value: it.
        stamp: what it was read from, as it was then.
        size: its bytes.
    """

    value: Value
    stamp: Hashable
    size: int


class ByteBudgetCache(Generic[Value]):
    """Values by name; safe under threads.

    The lock is known for a look into a dictionary, never while a value is read or used. Threads that ask for a value that is
    being read wait for that one reading. Whoever was given a value keeps it alive: what is dropped here goes when the last
    one lets go of it.

    Args:
        budget: how many bytes may be kept; None for any number.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self._values: OrderedDict[str, Loaded[Value]] = OrderedDict()
        self._loading: dict[tuple[str, Hashable], Future[Value]] = {}
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, name: str, stamp: Hashable, load: Callable[[], Loaded[Value]]) -> Value:
        """The value of a name.

        Args:
            name: of the value.
            stamp: what it is read from, as it is now; a value of another stamp is stale.
            load: reads it.

        Raises:
            Exception: what `load` raises, to each thread its own.
        """
        key = name, stamp
        while True:
            with self._lock:
                known = self._values.get(name)
                if known is not None and known.stamp == stamp:
                    self._values.move_to_end(name)
                    self._hits += 1
                    return known.value
                self._discard(name)
                awaited = self._loading.get(key)
                if awaited is None:
                    mine: Future[Value] = Future()
                    self._loading[key] = mine
                    self._misses += 1
            if awaited is None:
                return self._load(key, mine, load)
            if awaited.exception() is None:
                with self._lock:
                    self._hits += 1
                return awaited.result()
            # The reading failed: this thread tries for itself, and gets an error of its own.

    def _load(self, key: tuple[str, Hashable], mine: Future[Value], load: Callable[[], Loaded[Value]]) -> Value:
        try:
            loaded = load()
        except BaseException as error:
            with self._lock:
                self._wanted(key, mine)
            mine.set_exception(error)
            raise
        with self._lock:
            if self._wanted(key, mine):
                self._keep(key[0], loaded)
        mine.set_result(loaded.value)
        return loaded.value

    def _wanted(self, key: tuple[str, Hashable], mine: Future[Value]) -> bool:
        """Whether nobody dropped the name while it was read; the reading is over."""
        if self._loading.get(key) is not mine:
            return False
        del self._loading[key]
        return True

    def _keep(self, name: str, loaded: Loaded[Value]) -> None:
        self._discard(name)
        if self.budget is not None and loaded.size > self.budget:
            return  # the others would all have to go, and it as well
        self._values[name] = loaded
        self._bytes += loaded.size
        while self.budget is not None and self._bytes > self.budget:
            self._discard(next(iter(self._values)))
            self._evictions += 1

    def _discard(self, name: str) -> bool:
        known = self._values.pop(name, None)
        self._bytes -= 0 if known is None else known.size
        return known is not None

    def drop(self, name: str) -> bool:
        """Let go of a value, also of one that is being read; whether there was one."""
        with self._lock:
            for key in [key for key in self._loading if key[0] == name]:
                del self._loading[key]
            return self._discard(name)

    def names(self) -> tuple[str, ...]:
        """The names of the values that are kept, the most recently used last."""
        with self._lock:
            return tuple(self._values)

    def counters(self) -> StoreCounters:
        """What happened so far, and what is kept now."""
        with self._lock:
            return StoreCounters(self._hits, self._misses, self._evictions, len(self._values), self._bytes)
