"""Answers that were computed before, word for word: what is the same request, and what is kept.

Kept in memory only, least recently used first out. A version's answers are its own: what a rollback or a
promotion brings back or takes away needs no invalidation.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from services.core.discovery import VersionKey
from services.inference.backends.jobs import Finish
from services.inference.text import Delta, GenerateJob

LARGEST = 16  # an answer takes at most this part of the memory
ENTRY_BYTES = 1024  # of an entry beside its texts: key, order, deltas
LOGPROB_BYTES = 256


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """The same key, the same answer. `digest` stands for everything else that matters."""

    version: VersionKey
    digest: bytes


def answer_key(version: VersionKey, job: GenerateJob, client: str | None) -> AnswerKey | None:
    """The key of a deterministic job of `client`, or, if that is None, of whoever asks; None for a job that
    neither comes from nor goes into the cache."""
    if not (job.deterministic and job.cached):
        return None
    if job.temperature == 0:  # greedy: these change nothing
        job = replace(job, seed=None, top_p=1.0, top_k=0, min_p=0.0)
    # Chat templates may tell the date.
    today = datetime.now(UTC).date().isoformat() if job.turns else ""
    said = repr((client, today, job)).encode(errors="surrogatepass")
    return AnswerKey(version, hashlib.sha256(said).digest())


def merged(deltas: Sequence[Delta], cached: bool) -> list[Delta]:
    """The same in as few deltas as possible, one a candidate; the very last piece stays the last."""
    if len(deltas) == 1:
        only = deltas[0]
        return [only if only.cached == cached else replace(only, cached=cached)]
    pieces: dict[int, list[Delta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.index, []).append(delta)
    order = {delta.index: place for place, delta in enumerate(deltas)}
    return [
        Delta(
            text="".join(piece.text for piece in pieces[index]),
            finish=next((piece.finish for piece in reversed(pieces[index]) if piece.finish), Finish.NONE),
            prompt_tokens=pieces[index][-1].prompt_tokens,
            completion_tokens=pieces[index][-1].completion_tokens,
            index=index,
            logprobs=tuple(one for piece in pieces[index] for one in piece.logprobs),
            cached=cached,
        )
        for index in sorted(order, key=order.__getitem__)
    ]


def complete(deltas: Sequence[Delta], n: int) -> bool:
    """Whether all `n` candidates have come to their end, and not to that of the engine."""
    ends = {delta.index: delta.finish for delta in deltas if delta.finish}
    return len(ends) == n and set(ends.values()) <= {Finish.STOP, Finish.LENGTH}


class Answers:
    """At most `limit` bytes of answers, 0 for none; no single one takes more than a sixteenth of that."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[AnswerKey, tuple[tuple[Delta, ...], int]] = OrderedDict()
        self._of_version: Counter[VersionKey] = Counter()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: AnswerKey) -> tuple[Delta, ...] | None:
        """Deltas that say that they were cached; the last has the counts."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: AnswerKey, deltas: Sequence[Delta]) -> bool:
        """Keep a complete answer. False if it is too large."""
        answer = tuple(merged(deltas, cached=True))
        size = ENTRY_BYTES + sum(_size(delta) for delta in answer)
        if size > self._limit // LARGEST:
            return False
        self._drop(key)
        while self.bytes + size > self._limit:
            self._drop(next(iter(self._kept)))
        self._kept[key] = (answer, size)
        self._of_version[key.version] += 1
        self.bytes += size
        return True

    def keep_only(self, versions: Collection[VersionKey]) -> None:
        """Drop the answers of all others."""
        gone = [version for version in self._of_version if version not in versions]
        if gone:
            for key in [key for key in self._kept if key.version in gone]:
                self._drop(key)

    def _drop(self, key: AnswerKey) -> None:
        _, size = self._kept.pop(key, ((), 0))
        if size:
            self.bytes -= size
            self._of_version[key.version] -= 1
            if not self._of_version[key.version]:
                del self._of_version[key.version]


def _size(delta: Delta) -> int:
    return sys.getsizeof(delta.text) + len(delta.logprobs) * LOGPROB_BYTES
