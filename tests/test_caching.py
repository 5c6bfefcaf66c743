"""The cache of the values used last."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from gift_func.caching import LRU


class Named:
    """Something that can be referred to weakly."""


def test_the_least_recently_used_is_dropped() -> None:
    cache: LRU[str, int] = LRU(2)
    assert (cache.put("a", 1), cache.put("b", 2)) == (1, 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache)) == (1, None, 3, 2)


@pytest.mark.parametrize("use", ["put", "setdefault"])
def test_setting_counts_as_a_use(use: str) -> None:
    cache: LRU[str, int] = LRU(2)
    cache.put("a", 1)
    cache.put("b", 2)
    getattr(cache, use)("a", 4)
    cache.put("c", 3)
    assert cache.get("a") == {"put": 4, "setdefault": 1}[use]
    assert cache.get("b") is None


def test_none_is_a_value_and_a_default_is_returned_as_it_is() -> None:
    cache: LRU[str, int | None] = LRU(2)
    cache.put("a", None)
    assert cache.get("a", "missing") is None
    assert cache.get("b", "missing") == "missing"
    assert cache.setdefault("a", 1) is None


def test_a_cache_of_size_0_keeps_nothing() -> None:
    cache: LRU[str, int] = LRU(0)
    assert (cache.put("a", 1), cache.setdefault("b", 2), len(cache)) == (1, 2, 0)
    assert cache.get("a") is None


def test_discard() -> None:
    cache: LRU[str, int] = LRU(2)
    cache.put("a", 1)
    cache.discard("a")
    cache.discard("never there")
    assert (cache.get("a"), len(cache)) == (None, 0)


def test_a_weak_key_takes_its_value_with_it() -> None:
    cache: LRU[weakref.ref[Named], str] = LRU(2)
    first, second = Named(), Named()
    for key in (first, second):
        cache.put(weakref.ref(key, cache.discard), "value")
    del first, key
    gc.collect()
    assert (len(cache), cache.get(weakref.ref(second))) == (1, "value")


def test_a_finalizer_may_use_the_cache_that_drops_its_value() -> None:
    cache: LRU[int, Named] = LRU(1)
    value = Named()
    weakref.finalize(value, cache.discard, 7)
    cache.put(0, value)
    del value
    cache.put(1, Named())
    assert len(cache) == 1


def test_threads_agree_on_a_value_and_keep_to_the_size() -> None:
    cache: LRU[int, object] = LRU(4)

    def work(thread: int) -> None:
        for step in range(2000):
            key = (thread + step) % 8
            value = object()
            assert cache.setdefault(key, value) is not None
            cache.get((key + 3) % 8)
            cache.put((key + 5) % 8, value)
            assert len(cache) <= 5  # one more between a `put` and its end

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(cache) == 4
    with ThreadPoolExecutor(8) as pool:
        shared: LRU[str, object] = LRU(1)
        assert len(set(map(id, pool.map(lambda _: shared.setdefault("key", object()), range(64))))) == 1
