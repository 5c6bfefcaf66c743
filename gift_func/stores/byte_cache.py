"""A cache of values up to a number of bytes, from which the least recently used is dropped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

CachedValue = TypeVar("CachedValue")


@dataclass(frozen=True)
class StoreCounters:
    """The uses of a store so far, and its memory now.

    Attributes:
        hits: how many uses found their adapter in memory, or being read by another thread.
        misses: how many uses read a file.
        evictions: how many adapters were dropped to stay within the budget.
        resident: how many adapters are in memory.
        bytes: the size of their tensors.
    """

    hits: int
    misses: int
    evictions: int
    resident: int
    bytes: int


@dataclass(frozen=True)
class Loaded(Generic[CachedValue]):
    """A value that was read.

    Attributes:
        value: the value.
        stamp: the stamp of the file when it was read.
        size: the size of the value in bytes.
    """

    value: CachedValue
    stamp: Hashable
    size: int


class ByteBudgetCache(Generic[CachedValue]):
    """Values by name; safe under threads.

    The lock is not held while a value is read or used. Threads that ask for a value that another thread reads wait for it.

    Args:
        budget: the largest total size in bytes; None for no limit.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self._values: OrderedDict[str, Loaded[CachedValue]] = OrderedDict()
        self._loading: dict[tuple[str, Hashable], Future[CachedValue]] = {}
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, name: str, stamp: Hashable, load: Callable[[], Loaded[CachedValue]]) -> CachedValue:
        """The value of a name; it is read if it is not in the cache.

        Args:
            name: the name.
            stamp: the file's present stamp; a value with another stamp is dropped.
            load: reads the value.

        Raises:
            Exception: what `load` raises; each thread that waits calls it again.
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
                    mine: Future[CachedValue] = Future()
                    self._loading[key] = mine
                    self._misses += 1
            if awaited is None:
                return self._load(key, mine, load)
            if awaited.exception() is None:
                with self._lock:
                    self._hits += 1
                return awaited.result()
            # The other thread's `load` failed, so this one calls it too.

    def _load(
        self, key: tuple[str, Hashable], mine: Future[CachedValue], load: Callable[[], Loaded[CachedValue]]
    ) -> CachedValue:
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

    def _wanted(self, key: tuple[str, Hashable], mine: Future[CachedValue]) -> bool:
        """End a reading; return whether the name was not dropped meanwhile."""
        if self._loading.get(key) is not mine:
            return False
        del self._loading[key]
        return True

    def _keep(self, name: str, loaded: Loaded[CachedValue]) -> None:
        self._discard(name)
        if self.budget is not None and loaded.size > self.budget:
            return  # all values, and this one, would have to be dropped
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
        """Drop a value, also one that is being read; return whether there was one."""
        with self._lock:
            for key in [key for key in self._loading if key[0] == name]:
                del self._loading[key]
            return self._discard(name)

    def names(self) -> tuple[str, ...]:
        """The names of the values, the most recently used last."""
        with self._lock:
            return tuple(self._values)

    def counters(self) -> StoreCounters:
        """The counters."""
        with self._lock:
            return StoreCounters(self._hits, self._misses, self._evictions, len(self._values), self._bytes)
