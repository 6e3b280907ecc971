"""Long prompts in slices: which part of which prompt is computed next. Pure; engine.py does the computing.

A runtime computes prompts first come, first served, and many tokens a step: one long prompt slows every
stream and keeps all new ones waiting. So a long prompt is computed from its beginning in slices, each found
again in the runtime's prefix cache by the next; prompts take turns, and streams get their share of the time
between two slices. What the cache has lost meanwhile is computed again: slices are about time, not results.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Multiples of the prefix cache's block, 32 tokens on CPU.
BUSY_TOKENS = 128
IDLE_TOKENS = 256
LONG_TOKENS = 320  # shorter ones are left to the runtime: they cost less than a turn
MAX_KNOWN = 8192  # slices that are remembered as computed


@dataclass(slots=True)
class _Prompt:
    ids: Sequence[int]
    digests: list[bytes]  # of the first BUSY_TOKENS, of twice as many, …
    done: int = 0  # tokens that are computed


class Slices:
    """One slice is in progress at a time, from `due` to `computed`. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._prompts: dict[int, _Prompt] = {}
        self._turns: deque[int] = deque()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._current: tuple[int, int] | None = None  # whose slice is in progress, and up to which token
        self._spent_s = 0.0
        self._pause_until = 0.0

    @property
    def waiting(self) -> bool:
        """Whether there are prompts with something left to compute."""
        return bool(self._turns)

    def wants(self, ids: Sequence[int]) -> bool:
        """Whether the prompt is long enough for slices."""
        return len(ids) > LONG_TOKENS

    def push(self, number: int, ids: Sequence[int]) -> None:
        raw = np.asarray(ids, np.int64).tobytes()
        hasher, digests = hashlib.blake2b(digest_size=16), []
        for start in range(0, (len(ids) - 1) // BUSY_TOKENS * BUSY_TOKENS, BUSY_TOKENS):
            hasher.update(raw[start * 8 : (start + BUSY_TOKENS) * 8])
            digests.append(hasher.copy().digest())
        prompt = _Prompt(ids, digests)
        while (
            prompt.done // BUSY_TOKENS < len(digests) and digests[prompt.done // BUSY_TOKENS] in self._known
        ):
            self._known.move_to_end(digests[prompt.done // BUSY_TOKENS])
            prompt.done += BUSY_TOKENS
        self._prompts[number] = prompt
        self._turns.append(number)

    def drop(self, number: int) -> None:
        """Forget a prompt that is not wanted any more; unknown numbers are fine."""
        if self._prompts.pop(number, None) is not None:
            self._turns.remove(number)

    def due(self, now: float, *, idle: bool) -> tuple[int, Sequence[int] | None] | None:
        """(number, the prompt's beginning to compute), or (number, None) when the rest is short enough for
        the prompt to be taken as it is, and is forgotten here; None if nothing is due. `idle`: no stream
        waits for the next token meanwhile."""
        if not self._turns or (now < self._pause_until and not idle):
            return None
        number = self._turns.popleft()
        prompt = self._prompts[number]
        size = IDLE_TOKENS if idle else BUSY_TOKENS
        if len(prompt.ids) - prompt.done <= max(size, LONG_TOKENS if idle else 0):
            del self._prompts[number]
            return number, None
        self._turns.append(number)
        upto = prompt.done + size
        self._current = (number, upto)
        return number, prompt.ids[:upto]

    def spent(self, seconds: float) -> None:
        """A step took so long with the slice in it."""
        self._spent_s += seconds

    def computed(self, now: float) -> None:
        """The slice is done: streams now have as long for themselves as it took."""
        self._pause_until, self._spent_s = now + self._spent_s, 0.0
        if self._current is None:
            return
        (number, upto), self._current = self._current, None
        prompt = self._prompts.get(number)
        if prompt is None:
            return
        for digest in prompt.digests[prompt.done // BUSY_TOKENS : upto // BUSY_TOKENS]:
            self._known[digest] = None
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        prompt.done = upto
