"""The keys of the mirror in order, so that a prefix is a slice."""

from __future__ import annotations

from bisect import bisect_left, insort

LAST = "\U0010ffff"


class SortedKeys:
    """A set of keys. Finding is logarithmic; adding moves at most some kilobytes of pointers."""

    def __init__(self) -> None:
        self._keys: list[str] = []

    def add(self, key: str) -> None:
        """`key` must not be there."""
        if not self._keys or key > self._keys[-1]:
            self._keys.append(key)
        else:
            insort(self._keys, key)

    def discard(self, key: str) -> None:
        """`key` must be there."""
        del self._keys[bisect_left(self._keys, key)]

    def under(self, prefix: str) -> list[str]:
        start = bisect_left(self._keys, prefix)
        return self._keys[start : bisect_left(self._keys, prefix + LAST, start)]
