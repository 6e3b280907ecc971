"""One greedy sequence at a time, several tokens a step: what it may go on with is guessed (guesses.py),
computed together, and kept as far as it is what would have come anyway."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from services.inference.artifact import TextSpec
from services.inference.backends.alone import MOST_TOKENS
from services.inference.backends.guesses import Guesses, widths
from services.inference.backends.jobs import NOTHING, Finish, Job, Output
from services.inference.backends.paged import Paged

STEP_TOKENS = 256  # of a prompt


class Graph(Protocol):
    """A model of one sequence."""

    def likeliest(self, ids: Sequence[int], past: int, wanted: int) -> list[int]:
        """The likeliest token after each of the last `wanted` of `ids`, which come behind `past` tokens that
        were computed before; what was computed behind those is forgotten."""


def open_guessing(folder: Path, spec: TextSpec) -> GuessingText:
    """An OpenVINO model on the CPU. Raises ValueError for what is none, OSError where its weights are not."""
    weights = folder / spec.weights
    fixed = widths(weights.with_suffix(".bin").stat().st_size, spec.guesses)
    paged = Paged(weights, min(MOST_TOKENS, spec.context_tokens) + spec.guesses, fixed)
    return GuessingText(paged, set(spec.eos_token_ids), spec.guesses, max(fixed, default=0))


class GuessingText:
    """A Runtime with at most so many `guesses` a step; steps that have some have at least `width` tokens. It
    keeps no prefixes: whoever comes is computed from the start."""

    def __init__(self, graph: Graph, eos: Set[int], guesses: int, width: int = 0) -> None:
        self._graph = graph
        self._eos = eos
        self._guesses, self._width = guesses, width
        self._sequence: _Sequence | None = None

    def add(self, number: int, job: Job) -> _Sequence:
        """Raises ValueError while another one is computed."""
        if self._sequence is not None and not self._sequence.is_over():
            raise ValueError("one sequence at a time is computed with guesses")
        self._sequence = _Sequence(job, self._eos, self._guesses, self._width)
        return self._sequence

    def step(self) -> None:
        if self._sequence is not None and not self._sequence.is_over():
            self._sequence.advance(self._graph)

    def displaced(self) -> Sequence[tuple[int, Job]]:
        return ()

    def cache(self) -> None:
        """Nobody shares it."""


class _Sequence:
    """The engine's Handle of the sequence."""

    def __init__(self, job: Job, eos: Set[int], most_guesses: int, width: int) -> None:
        self._eos = eos
        self._most, self._width = most_guesses, width
        self._waiting = list(job.input_ids)  # to be computed before there is a next token
        self._left = job.sampling.max_tokens
        self._guesses = Guesses(job.input_ids)
        self._past = 0  # tokens that are computed
        self._ready: list[int] = []
        self._finish = Finish.NONE
        self._is_over = False

    def advance(self, graph: Graph) -> None:
        """A step. Does nothing when the last token is made."""
        if self._finish:
            return
        ids, self._waiting = self._waiting[:STEP_TOKENS], self._waiting[STEP_TOKENS:]
        if self._waiting:
            graph.likeliest(ids, self._past, 1)
            self._past += len(ids)
            return
        guesses = self._guesses.next(self._most) if len(ids) == 1 and self._left > 1 else []
        if guesses:
            guesses += guesses[-1:] * (self._width - 1 - len(guesses))
        made = graph.likeliest(ids + guesses, self._past, len(guesses) + 1)
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(guesses, made, strict=False)))
        self._past += len(ids) + right
        self._keep(made[: right + 1])

    def take(self) -> Output:
        if self._is_over or not self._ready:
            return NOTHING
        made = Output(self._ready, (), self._finish)
        self._ready = []
        self._is_over = bool(self._finish)
        return made

    def cancel(self) -> None:
        self._is_over = True

    def is_over(self) -> bool:
        return self._is_over

    def _keep(self, made: list[int]) -> None:
        """Up to the end of the answer, if they reach it."""
        for token in made:
            self._ready.append(token)
            self._left -= 1
            if token in self._eos:
                self._finish = Finish.STOP
            elif not self._left:
                self._finish = Finish.LENGTH
            if self._finish:
                return
        self._guesses.grow(made)
        self._waiting = made[-1:]
