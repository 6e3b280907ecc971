"""The cache of vectors and labels: exact, bounded, the least recently used goes first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.inference.rows import OVERHEAD, RowCache


def vector(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


ENTRY = OVERHEAD + 4 + 16  # one token, four components


@given(st.lists(st.integers(0, 30), max_size=120), st.integers(0, 10))
def test_it_never_holds_more_than_it_may_and_never_tells_wrong(uses: list[int], entries: int) -> None:
    cache = RowCache(entries * ENTRY)
    recent: list[int] = []
    for token in uses:
        key = cache.key([token])
        found = cache.get(key)
        assert (found is not None) == (token in recent)
        if found is None:
            cache.put(key, vector(token))
        else:
            assert np.array_equal(found, vector(token))
            recent.remove(token)
        recent = [*recent, token][-entries:] if entries else []
        assert cache.bytes == len(recent) * ENTRY <= entries * ENTRY
    assert cache.hits + cache.misses == len(uses)


def test_other_tokens_are_another_text() -> None:
    assert RowCache.key([1, 2]) != RowCache.key([1, 2, 0])
    assert RowCache.key([1, 256]) != RowCache.key([256, 1])


def test_what_it_keeps_is_its_own() -> None:
    """A row of a large answer does not keep the whole answer in memory, and nobody changes it."""
    cache = RowCache(1 << 20)
    many = np.zeros((1000, 4), np.float32)
    cache.put(b"k", many[3])
    many[3] = 1
    found = cache.get(b"k")
    assert found is not None
    assert found.base is None
    assert not found.any()


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = RowCache(100)
    cache.put(b"k", np.zeros(1000, np.float32))
    assert (cache.bytes, cache.get(b"k")) == (0, None)
