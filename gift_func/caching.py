"""A cache of the values used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar, overload

Key = TypeVar("Key", bound=Hashable)
Cached = TypeVar("Cached")
Default = TypeVar("Default")


class LRU(Generic[Key, Cached]):
    """A dictionary of at most `size` values, from which the least recently used is dropped; safe under threads.

    To not keep an object alive that is a key, use `weakref.ref(object, cache.discard)` as the key.

    Args:
        size: the largest number of values; 0 for a cache that keeps none.

    Example:
        >>> from gift_func.caching import LRU
        >>> cache = LRU(2)
        >>> cache.put("a", 1), cache.put("b", 2), cache.get("a"), cache.put("c", 3)
        (1, 2, 1, 3)
        >>> cache.get("b"), len(cache)
        (None, 2)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Key, Cached] = OrderedDict()
        # Dropping a value can run finalizers and callbacks of weak references, which may use this cache again.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def get(self, key: Key) -> Cached | None: ...
    @overload
    def get(self, key: Key, default: Default) -> Cached | Default: ...
    def get(self, key: Key, default: object = None) -> object:
        """The value of a key, which is then the one used last, or `default`."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        return default

    def put(self, key: Key, value: Cached) -> Cached:
        """Set the value of a key, and return it."""
        with self._lock:
            self._values[key] = value
            return self.setdefault(key, value)

    def setdefault(self, key: Key, value: Cached) -> Cached:
        """Set the value of a key unless it has one, which another thread may have set; the value that it has now."""
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        return value

    def discard(self, key: Key) -> None:
        """Drop a key and its value, if it is there."""
        with self._lock:
            self._values.pop(key, None)
