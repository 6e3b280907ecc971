"""What a text engine is asked for and what it tells, and the interfaces of what it works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

MAX_TOP_K = 1_000_000  # more than any vocabulary
MAX_TEMPERATURE = 2.0
MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0


class Finish(IntEnum):
    """Why a sequence ended; NONE while it goes on. REFUSED: the engine can never compute it; FAILED: it could
    not this time."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    FAILED = 4
    REFUSED = 5


class GrammarKind(StrEnum):
    """How a Grammar's text is to be read."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text has to keep to: a JSON Schema (as JSON text) or a regular expression."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_p 1, top_k 0, min_p 0, penalties 1, 0 and 0 mean no such limit. Seeds are
    used with a temperature only."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the field: the engine itself would only say that it cannot go on."""
        for name in ("max_tokens", "top_k", "seed"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}: a whole number is needed")
        rules = {
            "max_tokens: 1 or more": self.max_tokens >= 1,
            "temperature: 0 to 2": 0 <= self.temperature <= MAX_TEMPERATURE,
            "top_p: above 0, at most 1": 0 < self.top_p <= 1,
            f"top_k: 0 to {MAX_TOP_K}": 0 <= self.top_k <= MAX_TOP_K,
            "seed: 0 to 2^64 - 1": 0 <= self.seed < 2**64,
            "min_p: 0 to below 1": 0 <= self.min_p < 1,
            "repetition_penalty: above 0, at most 2": 0 < self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "presence_penalty: -2 to 2": abs(self.presence_penalty) <= MAX_PENALTY,
            "frequency_penalty: -2 to 2": abs(self.frequency_penalty) <= MAX_PENALTY,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate. `key` is the sink's own name for it."""

    key: int
    input_ids: Sequence[int]
    sampling: Sampling


class Sink(Protocol):
    """Where tokens go. Called on the engine's thread only."""

    def gone(self) -> bool:
        """True when nobody reads any more: all jobs of the sink are then dropped."""

    def emit(self, key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float] = ()) -> None:
        """New tokens of a job, and their log-probabilities if it asked for them; the last call for a job has
        a finish other than NONE."""

    def step_done(self, running: int) -> None:
        """All of one step was emitted; `running` sequences go on."""

    def alive(self) -> None:
        """The engine works, though it may have nothing to emit."""


@dataclass(slots=True)
class Counts:
    """The engine's work so far; `sequences` are in progress now. `wasted` of the `tokens` were computed for
    sequences that were cancelled or abandoned; `reopened` is how often the runtime had to be opened anew.
    `cache` is the share of the KV cache that was taken at the last step, 0 to 1; None where nobody knows."""

    sequences: int = 0
    steps: int = 0
    tokens: int = 0
    wasted: int = 0
    reopened: int = 0
    cache: float | None = None


class Output(NamedTuple):
    """What a sequence has made since it was asked last; log-probabilities if its job wants them."""

    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    finish: Finish = Finish.NONE


NOTHING = Output()


class Handle(Protocol):
    """A sequence inside the engine. It is taken from until it has a finish, or cancelled."""

    def take(self) -> Output:
        """Asked after each step. The last has the finish, which is told once."""

    def cancel(self) -> None:
        """Nobody wants more. May be called of one that has ended."""

    def is_over(self) -> bool:
        """Whether the finish was told, or it was cancelled."""


class Runtime(Protocol):
    """An engine to step."""

    def add(self, number: int, job: Job) -> Handle:
        """Begin a sequence. Raises ValueError for a job that the engine refuses."""

    def step(self) -> None:
        """Compute what the scheduler finds best. Whatever it raises makes the runtime unusable."""

    def displaced(self) -> Sequence[tuple[int, Job]]:
        """Numbers of sequences that the runtime computes no further, and what is left of each: they are to be
        added again. Asked after each step, when all that was made has been read."""

    def cache(self) -> float | None:
        """The share of the KV cache that was taken at the last step, 0 to 1; None if it is not told. Asked
        after each step."""
