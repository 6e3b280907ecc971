"""Guesses of the real engine change no answer: not alone, not when a stream moves or is cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pipeline.bundled import TEXT_MODEL
from services.inference.artifact import Manifest
from services.inference.backends.alone import Alone
from services.inference.backends.guessing import GuessingText, open_guessing
from services.inference.backends.jobs import Handle, Job, Sampling
from services.inference.backends.openvino_text import OpenVinoText


class Counted:
    """Guesses, with the number of steps they took."""

    def __init__(self, runtime: GuessingText) -> None:
        self.add, self.displaced, self.cache = runtime.add, runtime.displaced, runtime.cache
        self._step = runtime.step
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        self._step()


class Engine:
    """The bundled model with guesses, which its artifact does without."""

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.read(folder)
        assert self.manifest.text is not None
        spec = self.manifest.text.model_copy(update={"guesses": 7})
        self.guessing = Counted(open_guessing(folder, spec))
        self.runtime = Alone(OpenVinoText(folder, spec, kv_cache_gib=1, max_sequences=64), self.guessing)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._number = 0
        self._handles: dict[int, Handle] = {}
        self.made: dict[int, list[int]] = {}

    def add(self, ids: Sequence[int], tokens: int) -> int:
        self._number += 1
        self._admit(self._number, Job(0, list(ids), Sampling(tokens)))
        return self._number

    def counting(self, start: int, tokens: int = 64) -> int:
        return self.add(self.tokenizer.encode(", ".join(str(start + n) for n in range(8)) + ",").ids, tokens)

    def turn(self) -> None:
        self.runtime.step()
        for number, handle in list(self._handles.items()):
            self.made[number] += handle.take().tokens
            if handle.is_over():
                del self._handles[number]
        for number, rest in self.runtime.displaced():
            self._admit(number, rest)

    def cancel(self, number: int) -> None:
        self._handles.pop(number).cancel()

    def finish(self) -> None:
        while self._handles:
            self.turn()

    def numbers(self, number: int) -> list[int]:
        """What was counted, without the last, which may be half a number."""
        return [int(word) for word in self.tokenizer.decode(self.made[number]).split(",")[:-1]]

    def _admit(self, number: int, job: Job) -> None:
        self.made.setdefault(number, [])
        self._handles[number] = self.runtime.add(number, job)


@pytest.fixture(scope="module")
def engine(artifacts: dict[str, Path]) -> Engine:
    return Engine(artifacts[TEXT_MODEL])


def test_golden_answers_are_the_same_alone_with_guesses(engine: Engine) -> None:
    for golden in engine.manifest.golden_texts:
        number = engine.add(golden.prompt_ids, len(golden.token_ids))
        engine.finish()
        assert tuple(engine.made[number]) == golden.token_ids


def test_repetition_takes_fewer_steps_and_no_token_more_than_asked_for(engine: Engine) -> None:
    before = engine.guessing.steps
    number = engine.counting(100, 63)
    engine.finish()
    assert engine.numbers(number) == list(range(108, 108 + len(engine.numbers(number))))
    assert len(engine.made[number]) == 63
    assert engine.guessing.steps - before < 50


def test_a_stream_that_gets_company_goes_on_where_it_was(engine: Engine) -> None:
    first = engine.counting(200)
    for _ in range(10):
        engine.turn()
    assert 10 <= len(engine.made[first]) < 64
    others = [engine.counting(start) for start in (300, 400, 500)]
    engine.finish()
    for number, start in zip((first, *others), (200, 300, 400, 500), strict=True):
        numbers = engine.numbers(number)
        assert len(engine.made[number]) == 64
        assert len(numbers) > 10
        assert numbers == list(range(start + 8, start + 8 + len(numbers)))


def test_a_cancelled_one_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.inference.backends.alone.QUIET_S", 0.0)
    for start in range(600, 900, 50):
        given_up = engine.counting(start)
        for _ in range(3):
            engine.turn()
        engine.cancel(given_up)
        number = engine.counting(start)
        engine.finish()
        numbers = engine.numbers(number)
        assert numbers == list(range(start + 8, start + 8 + len(numbers)))
