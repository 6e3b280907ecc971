"""What a version answered, short enough to be compared, and how far two answers to one request are apart."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# Answers that wait for the other of their pair.
MAX_WAITING = 20_000
MAX_WAITING_BYTES = 32 << 20
MAX_WAIT_S = 120.0
OVERHEAD_BYTES = 400


class Kind(StrEnum):
    """How answers are compared; the name of the figure that comes of it."""

    LABELS = "label_agreement"
    VECTORS = "cosine"
    TOKENS = "token_divergence"


@dataclass(frozen=True, slots=True)
class Failed:
    """There was no answer, and that was the version's fault."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The label of each text."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """FP16 [texts, components]."""

    values: npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Generated tokens, two bytes of each; `vocabulary` tells tokenizers apart."""

    values: bytes
    vocabulary: int


Content: TypeAlias = Failed | Labels | Vectors | Tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """`pair` is what a copy has in common with its original, `input` a digest of what was asked."""

    model: str
    version: int
    pair: str
    copy: bool
    input: int
    content: Content

    @property
    def bytes(self) -> int:
        """Of memory, about."""
        size = 0
        match self.content:
            case Vectors(values):
                size = values.nbytes
            case Tokens(values, _):
                size = len(values)
            case Labels(values):
                size = sum(60 + len(value) for value in values)
        return OVERHEAD_BYTES + size


@dataclass(frozen=True, slots=True)
class Pair:
    """A version's answer to the copy of a request, and that of version `before` to the request: `difference`
    is 0 for alike, 1 for as different as can be, None if they cannot be compared or there are not two."""

    model: str
    version: int
    before: int
    input: int
    failed: bool
    failed_before: bool
    kind: Kind | None = None
    difference: float | None = None


class Pairs:
    """Answers of one request that come one after the other, from whatever replicas. Who waits too long, or
    has too many behind it, is dropped and counted."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[str, str, bool], tuple[Answer, float]] = OrderedDict()
        self._bytes = 0
        self.dropped = 0

    def take(self, answer: Answer, now_s: float) -> Pair | None:
        """The pair that it completes. Of several answers to one request the last counts."""
        self._expire(now_s)
        other = self._pop((answer.model, answer.pair, not answer.copy))
        if other is None:
            self._keep(answer, now_s)
            return None
        copy, original = (answer, other) if answer.copy else (other, answer)
        if copy.version == original.version:
            return None
        failed, failed_before = (isinstance(one.content, Failed) for one in (copy, original))
        kind, difference = compared(original.content, copy.content)
        return Pair(
            copy.model,
            copy.version,
            original.version,
            original.input,
            failed,
            failed_before,
            kind,
            difference,
        )

    def _keep(self, answer: Answer, now_s: float) -> None:
        key = (answer.model, answer.pair, answer.copy)
        self._pop(key)
        self._waiting[key] = answer, now_s
        self._bytes += answer.bytes
        while len(self._waiting) > MAX_WAITING or self._bytes > MAX_WAITING_BYTES:
            self._drop()

    def _pop(self, key: tuple[str, str, bool]) -> Answer | None:
        found = self._waiting.pop(key, None)
        if found is None:
            return None
        self._bytes -= found[0].bytes
        return found[0]

    def _expire(self, now_s: float) -> None:
        while self._waiting and now_s - next(iter(self._waiting.values()))[1] > MAX_WAIT_S:
            self._drop()

    def _drop(self) -> None:
        _, (answer, _) = self._waiting.popitem(last=False)
        self._bytes -= answer.bytes
        self.dropped += 1


def compared(original: Content, copy: Content) -> tuple[Kind | None, float | None]:
    """How they are compared, and how far they are apart."""
    match original, copy:
        case Labels(before), Labels(after):
            if len(before) != len(after) or not before:
                return Kind.LABELS, None
            return Kind.LABELS, sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
        case Vectors(before), Vectors(after):
            return Kind.VECTORS, _distance(before, after)
        case Tokens(before, one), Tokens(after, other):
            return Kind.TOKENS, _divergence(before, after) if one == other else None
    return None, None


def _distance(before: npt.NDArray[np.float16], after: npt.NDArray[np.float16]) -> float | None:
    """The mean of 1 - cosine, at most 1 each; what has no direction is unlike all that have one."""
    if before.shape != after.shape or not before.size:
        return None
    # Brought to scale first, so that no sum of squares overflows.
    a, b = _scaled(before), _scaled(after)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    nothing = (~a.any(axis=1)) & (~b.any(axis=1))
    products = np.sum(a * b, axis=1)
    cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    cosines = np.where(nothing, 1.0, np.nan_to_num(cosines, nan=0.0))
    return float(np.mean(np.clip(1.0 - cosines, 0.0, 1.0)))


def _scaled(values: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    most = np.max(np.abs(wide), axis=1, keepdims=True)
    return np.divide(wide, most, out=np.zeros_like(wide), where=(most > 0) & np.isfinite(most))


def _divergence(before: bytes, after: bytes) -> float:
    """The share of the longer answer that comes behind the first token in which they differ."""
    a, b = np.frombuffer(before, "<u2"), np.frombuffer(after, "<u2")
    longer, shorter = max(len(a), len(b)), min(len(a), len(b))
    if not longer:
        return 0.0
    unlike = np.flatnonzero(a[:shorter] != b[:shorter])
    same = int(unlike[0]) if len(unlike) else shorter
    return 1.0 - same / longer
