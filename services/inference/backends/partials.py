"""Which prompts may be computed side by side, given what a prefix cache holds. Pure.

OpenVINO GenAI keeps blocks of a prompt's keys and values for prompts that begin alike, blocks that are filled
in part included. A sequence that begins with such a block goes on to fill it; it copies it first if others
use it too, but not when its prompt goes on beyond the block (BlockManager::append_slots, seen in 2026.4.1).
Two prompts of one step that go on from the same block thus write over each other, and both answers are
wrong: two questions that follow on one conversation are enough. So only one prompt at a time may claim a
block that is filled in part. Whole blocks are only read, and shared freely.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BLOCK_TOKENS = 32  # of the engine's KV cache on CPU
MAX_TAILS = 32_768  # more blocks than a cache of 16 GiB has for a model of 135 million parameters
_BLOCK_BYTES = 4 * BLOCK_TOKENS

_Tail = tuple[bytes, bytes]  # the digest of the whole blocks before it, and the tokens of the last


@dataclass(slots=True)
class _Live:
    prompt: Sequence[int]
    generated: list[int] = field(default_factory=list)

    def computed(self) -> int:
        """Of how many tokens the cache has keys and values: the last one has been drawn and not been read."""
        return len(self.prompt) + len(self.generated) - 1

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt begins with all that is computed here."""
        own = len(self.prompt)
        return (
            bool(self.generated)
            and prompt[0] == self.prompt[0]
            and list(prompt[own : self.computed()]) == self.generated[:-1]
            and list(prompt[:own]) == list(self.prompt)
        )


class Partials:
    """Sequences are known by numbers: `claim` is asked before one is computed, `ended` told afterwards."""

    def __init__(self) -> None:
        self._live: dict[int, _Live] = {}
        self._tails: OrderedDict[_Tail, None] = OrderedDict()
        self._after: defaultdict[bytes, set[bytes]] = defaultdict(set)
        self._claimed: dict[_Tail, int] = {}  # by whom, until its prompt is computed
        self._refused: dict[int, _Tail] = {}  # which claim of another stood in the way

    def claim(self, number: int, prompt: Sequence[int]) -> bool:
        """Whether the prompt may be computed now. If not, ask again once others have made tokens."""
        if self._refused.get(number) in self._claimed:
            return False
        found = self._begun_by(prompt)
        for key in found:
            if key in self._claimed:
                self._refused[number] = key
                return False
        self._refused.pop(number, None)
        self._claimed.update(dict.fromkeys(found, number))
        self._live[number] = _Live(prompt)
        return True

    def grew(self, number: int, tokens: Sequence[int]) -> None:
        """A sequence made tokens; with the first, its prompt is computed."""
        live = self._live.get(number)
        if live is not None and tokens:
            if not live.generated:
                self._release(number)
            live.generated += tokens

    def ended(self, number: int) -> None:
        """Nothing is computed for the sequence any more; unknown numbers are fine."""
        self._refused.pop(number, None)
        live = self._live.pop(number, None)
        if live is None:
            return
        self._release(number)
        if live.generated:
            # All but the last token is computed; or all, if a stop token that is not told of came after it.
            content = _raw([*live.prompt, *live.generated])
            self._leave(content[:-4])
            self._leave(content)

    def _release(self, number: int) -> None:
        for key in [key for key, owner in self._claimed.items() if owner == number]:
            del self._claimed[key]

    def _leave(self, content: bytes) -> None:
        whole = len(content) // _BLOCK_BYTES * _BLOCK_BYTES
        if whole == len(content):
            return
        tail = _digest(content[:whole]), content[whole:]
        self._tails[tail] = None
        self._tails.move_to_end(tail)
        self._after[tail[0]].add(tail[1])
        while len(self._tails) > MAX_TAILS:
            (before, tokens), _ = self._tails.popitem(last=False)
            self._after[before].discard(tokens)
            if not self._after[before]:
                del self._after[before]

    def _begun_by(self, prompt: Sequence[int]) -> list[_Tail]:
        """The blocks filled in part that the prompt could go on from: left by the ended, or in use."""
        for live in self._live.values():
            if (content := live.computed()) <= len(prompt) and live.begins(prompt):
                self._leave(_raw(prompt[:content]))
        raw, hasher = _raw(prompt), hashlib.blake2b(digest_size=16)
        found: list[_Tail] = []
        for start in range(0, len(raw), _BLOCK_BYTES):
            before = hasher.digest()
            if tails := self._after.get(before):
                ends = range(start + 4, min(start + _BLOCK_BYTES, len(raw) + 4), 4)
                found += [(before, raw[start:end]) for end in ends if raw[start:end] in tails]
            hasher.update(raw[start : start + _BLOCK_BYTES])
        return found


def _raw(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
