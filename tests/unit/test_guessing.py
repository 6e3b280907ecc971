"""Several tokens a step change no answer: with a scripted model that knows what it has computed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.backends.guessing import STEP_TOKENS, GuessingText
from services.inference.backends.jobs import Finish, Job, Sampling

PROMPT = (3, 1, 4, 1, 5)


class Model:
    """What comes next follows from the last two tokens and, every so often, from how many there are: it
    repeats itself, and then does not. Like a cache it forgets what was computed behind `past`."""

    def __init__(self, vocabulary: int = 7, surprise: int = 9) -> None:
        self._vocabulary, self._surprise = vocabulary, surprise
        self._computed: list[int] = []
        self.lengths: list[int] = []

    def next(self, said: Sequence[int]) -> int:
        surprise = len(said) // self._surprise if len(said) % self._surprise == 0 else 0
        return (sum(said[-2:]) + 1 + surprise) % self._vocabulary

    def likeliest(self, ids: Sequence[int], past: int, wanted: int) -> list[int]:
        assert 0 <= past <= len(self._computed), "a token was left out"
        assert 1 <= wanted <= len(ids)
        self.lengths.append(len(ids))
        self._computed[past:] = ids
        ends = range(len(self._computed) - wanted, len(self._computed))
        return [self.next(self._computed[: end + 1]) for end in ends]

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        said = list(ids)
        for _ in range(tokens):
            said.append(self.next(said))
        return said[len(ids) :]


def answer(runtime: GuessingText, ids: Sequence[int], tokens: int) -> tuple[list[int], Finish]:
    handle = runtime.add(1, Job(0, list(ids), Sampling(tokens)))
    made: list[int] = []
    for _ in range(tokens + len(ids)):
        runtime.step()
        found = handle.take()
        made += found.tokens
        if handle.is_over():
            assert handle.take().tokens == ()
            return made, found.finish
    raise AssertionError("never ended")


@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=20),
    tokens=st.integers(1, 80),
    guesses=st.integers(1, 16),
    padded=st.booleans(),
    surprise=st.integers(2, 40),
)
def test_the_answer_is_what_it_is_without_guesses(
    ids: list[int], tokens: int, guesses: int, padded: bool, surprise: int
) -> None:
    model = Model(surprise=surprise)
    runtime = GuessingText(model, frozenset(), guesses, guesses + 1 if padded else 0)
    assert answer(runtime, ids, tokens) == (model.answer(ids, tokens), Finish.LENGTH)
    assert set(model.lengths[1:]) <= ({1, guesses + 1} if padded else set(range(1, guesses + 2)))


@given(st.integers(0, 6), st.integers(1, 80))
def test_the_end_may_be_among_the_guesses(end: int, tokens: int) -> None:
    model = Model()
    expected = model.answer(PROMPT, tokens)
    made, finish = answer(GuessingText(model, {end}, 7, 8), PROMPT, tokens)
    if end in expected:
        assert (made, finish) == (expected[: expected.index(end) + 1], Finish.STOP)
    else:
        assert (made, finish) == (expected, Finish.LENGTH)


def test_repetition_takes_fewer_steps() -> None:
    model = Model(surprise=1000)
    answer(GuessingText(model, frozenset(), 7, 8), PROMPT, 80)
    assert len(model.lengths) < 40


def test_a_long_prompt_is_computed_in_parts() -> None:
    model, ids = Model(), [number % 7 for number in range(2 * STEP_TOKENS + 1)]
    assert answer(GuessingText(model, frozenset(), 7, 8), ids, 20)[0] == model.answer(ids, 20)
    assert model.lengths[:2] == [STEP_TOKENS, STEP_TOKENS]


def test_one_at_a_time_and_after_it_the_next() -> None:
    model = Model()
    runtime = GuessingText(model, frozenset(), 7, 8)
    runtime.step()
    first = runtime.add(1, Job(0, PROMPT, Sampling(50)))
    runtime.step()
    with pytest.raises(ValueError, match="one sequence at a time"):
        runtime.add(2, Job(0, PROMPT, Sampling(50)))
    first.cancel()
    before = len(model.lengths)
    runtime.step()
    assert (first.take().tokens, len(model.lengths)) == ((), before)
    assert answer(runtime, (2, 6), 30)[0] == model.answer((2, 6), 30)
