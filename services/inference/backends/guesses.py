"""What a sequence goes on with, guessed from what it has said before (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding), and what it is worth to compute guesses fast. Pure."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 3  # so many of the last tokens, or fewer, are looked for in what was before
SHORTEST = 2  # for the first guess: what followed a single token is right too seldom (docs/benchmarks.md)
SMALL_BYTES = 256 << 20  # of weights; in larger models the parts of a step are what takes time


class Guesses:
    """Of one sequence. Memory: an entry for each token and each length."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # what followed these tokens when they came last
        self._last: tuple[int, ...] = ()
        self.grow(ids)

    def grow(self, ids: Iterable[int]) -> None:
        for token in ids:
            for start in range(len(self._last)):
                self._after[self._last[start:]] = token
            self._last = (*self._last, token)[-LONGEST:]

    def next(self, most: int) -> list[int]:
        """At most so many tokens; none if the last ones never came before. Each is what followed the longest
        end of what stands before it, so that a guess may go on from another place than the one before."""
        found: list[int] = []
        last = self._last
        while len(found) < most:
            shortest = 1 if found else SHORTEST
            ends = (last[start:] for start in range(len(last) - shortest + 1))
            token = next((self._after[end] for end in ends if end in self._after), None)
            if token is None:
                break
            found.append(token)
            last = (*last, token)[-LONGEST:]
        return found


def widths(weights_bytes: int, guesses: int) -> tuple[int, ...]:
    """How many tokens the steps have for which a graph of their own is worth its memory: packed weights."""
    return (1, guesses + 1) if weights_bytes <= SMALL_BYTES else ()
