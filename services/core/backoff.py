"""Exponential back-off with full jitter (Brooker, AWS Architecture Blog, 2015)."""

from __future__ import annotations

import random


class Backoff:
    """`delay()` grows from about `first_s` to about `most_s`; `reset()` after a success."""

    def __init__(self, first_s: float = 0.1, most_s: float = 2.0) -> None:
        self._first = first_s
        self._most = most_s
        self._tries = 0

    def reset(self) -> None:
        self._tries = 0

    def delay(self) -> float:
        ceiling = min(self._most, self._first * 2**self._tries)
        self._tries = min(self._tries + 1, 30)
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, protects nothing
