"""Extractive question answering as this service serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from services.core.discovery import VersionKey
from services.core.errors import InvalidInput
from services.inference.artifact import AnswererSpec
from services.inference.callers import Priority
from services.inference.encoder import Budget, Encoder, Row
from services.inference.extraction import Span, Window, best, whole
from services.inference.tokens import unblocked
from services.inference.triton import Triton

CONTEXT = 1  # which of the two texts a token is of, as tokenizers count them


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request: at most `top` answers of at most `max_answer_tokens`."""

    question: str
    context: str
    top: int = 1
    max_answer_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Answers:
    """Spans of the context, best first, and how many tokens were read, in all windows."""

    spans: list[Span]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """The question and a window of the context: its tokens are those from `begin` to `end` of `row`, `first`
    is the number of the first of them in the context, `places` as in Window."""

    row: Row
    begin: int
    end: int
    first: int
    places: npt.NDArray[np.int64]

    def window(self, logits: Mapping[str, npt.NDArray[np.float32]]) -> Window:
        starts, ends = logits["start_logits"], logits["end_logits"]
        null = float(starts[0]), float(ends[0])
        context = slice(self.begin, self.end)
        return Window(self.first, self.places, starts[context], ends[context], null)


class AnswerModel(Encoder):
    """One version of a question answering model in one Triton."""

    def __init__(self, key: VersionKey, spec: AnswererSpec, folder: Path, triton: Triton) -> None:
        super().__init__(key, spec, folder, triton, cache_bytes=0)
        self._no_answer = spec.no_answer
        # A question leaves half of a window and a few special tokens less: the stride has to be less than
        # that.
        self._stride = min(spec.stride, spec.max_tokens // 4)
        self._pairs = Tokenizer.from_str(self._whole.to_str())
        self._pairs.enable_truncation(spec.max_tokens, stride=self._stride, strategy="only_second")

    async def answer(
        self, job: Question, timeout: float | None = None, *, priority: Priority = Priority.NORMAL
    ) -> Answers:
        """Raises InvalidInput for a question too long, and what Triton.infer raises."""
        budget = Budget.of(timeout, priority)
        characters = len(job.question) + len(job.context)
        pieces = await unblocked(characters, lambda: self._pieces(job))
        outputs = await self.compute([piece.row for piece in pieces], budget)
        windows = [piece.window(logits) for piece, logits in zip(pieces, outputs, strict=True)]
        spans = await unblocked(
            characters, lambda: best(windows, job.top, job.max_answer_tokens, self._no_answer)
        )
        tokens = sum(len(piece.row.ids) for piece in pieces)
        return Answers([whole(job.context, span) for span in spans], tokens)

    def _pieces(self, job: Question) -> list[_Piece]:
        """Raises InvalidInput for a question too long."""
        tokens = len(self._whole.encode(job.question, add_special_tokens=False).ids)
        if tokens >= self._max_tokens // 2:
            raise InvalidInput(
                "question",
                f"{tokens} tokens, but must be fewer than {self._max_tokens // 2}, half of what "
                f"{self.key.model} reads at once",
            )
        encoding = self._pairs.encode(job.question, job.context)
        pieces: list[_Piece] = []
        first = step = 0
        for window in (encoding, *encoding.overflowing):
            sequences = window.sequence_ids
            begin = sequences.index(CONTEXT) if CONTEXT in sequences else len(sequences)
            size = sequences.count(CONTEXT)  # in one piece
            row = Row(window.ids, window.type_ids)
            places = np.array(window.offsets[begin : begin + size], np.int64).reshape(-1, 2)
            pieces.append(_Piece(row, begin, begin + size, first, places))
            step = step or size - self._stride
            first += step
        return pieces
