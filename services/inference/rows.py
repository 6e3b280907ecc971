"""What an encoder computed before: an exact cache of one version's vectors or labels, by text.

In place of Triton's own response cache, whose key leaves out the shapes of the inputs and is 64 bits of a
hash anybody can aim at: it gave one text's vector for two texts of the same tokens (docs/decisions.md)."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]

OVERHEAD = 300
"""Bytes of Python around an entry, about."""


class RowCache:
    """Least recently used entries go first when there are more than `capacity` bytes. The tokens themselves
    are the key, so that nothing is ever taken for something else. It belongs to one version and ends with
    it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[bytes, Values] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    @staticmethod
    def key(ids: Sequence[int]) -> bytes:
        return array("i", ids).tobytes()

    def get(self, key: bytes) -> Values | None:
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, values: Values) -> None:
        """Keep a copy: `values` may be part of something large."""
        size = _size(key, values)
        if key in self._entries or size > self._capacity:
            return
        self._entries[key] = values.copy()
        self.bytes += size
        while self.bytes > self._capacity:
            self.bytes -= _size(*self._entries.popitem(last=False))


def _size(key: bytes, values: Values) -> int:
    return len(key) + values.nbytes + OVERHEAD
