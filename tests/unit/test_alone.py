"""A stream that is alone guesses, and joins the others as soon as there are any: with scripted runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.backends.alone import MOST_TOKENS, PROMPT_TOKENS, QUIET_S, Alone, suits
from services.inference.backends.jobs import NOTHING, Finish, Grammar, GrammarKind, Job, Output, Sampling


def token_after(ids: Sequence[int]) -> int:
    """A model: what comes next depends on all that came before."""
    return (sum(ids) * 31 + len(ids)) % 1000


class Scripted:
    def __init__(self, job: Job) -> None:
        self.ids, self.left = list(job.input_ids), job.sampling.max_tokens
        self.is_running, self.is_told = True, False
        self._ready: list[Output] = []

    def advance(self, tokens: int) -> None:
        made = []
        for _ in range(min(tokens, self.left)):
            made.append(token_after(self.ids))
            self.ids.append(made[-1])
        self.left -= len(made)
        if self.is_running:
            self._ready.append(Output(made, (), Finish.NONE if self.left else Finish.LENGTH))
            self.is_running = bool(self.left)

    def take(self) -> Output:
        made = self._ready.pop(0) if self._ready else NOTHING
        self.is_told |= bool(made.finish)
        return made

    def cancel(self) -> None:
        self.is_running, self.is_told = False, True

    def is_over(self) -> bool:
        return self.is_told


class Runtime:
    """Makes so many tokens a step of each sequence."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.steps = tokens, 0
        self.sequences: dict[int, Scripted] = {}

    def add(self, number: int, job: Job) -> Scripted:
        self.sequences[number] = Scripted(job)
        return self.sequences[number]

    def step(self) -> None:
        self.steps += 1
        for sequence in self.sequences.values():
            if sequence.is_running:
                sequence.advance(self.tokens)

    def displaced(self) -> Sequence[tuple[int, Job]]:
        return ()

    def cache(self) -> None:
        pass


class World:
    """What an engine does with the runtime, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.shared, self.guessing = Runtime(1), Runtime(3)
        self.runtime = Alone(self.shared, self.guessing, lambda: self.now)
        self.handles: dict[int, Any] = {}
        self.made: dict[int, list[int]] = {}

    def add(self, number: int, job: Job) -> None:
        self.made.setdefault(number, [])
        self.handles[number] = self.runtime.add(number, job)

    def turn(self) -> None:
        self.runtime.step()
        for number, handle in list(self.handles.items()):
            self.made[number] += handle.take().tokens
            if handle.is_over():
                del self.handles[number]
        for number, rest in self.runtime.displaced():
            if number in self.handles:
                self.add(number, rest)

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.handles:
                return
            self.turn()
        raise AssertionError(f"never ended: {list(self.handles)}")


def job(tokens: int = 30, ids: Sequence[int] = (1, 2)) -> Job:
    return Job(0, list(ids), Sampling(tokens))


def expected(asked: Job) -> list[int]:
    ids = list(asked.input_ids)
    for _ in range(asked.sampling.max_tokens):
        ids.append(token_after(ids))
    return ids[len(asked.input_ids) :]


@pytest.fixture
def world() -> World:
    return World()


def test_a_stream_alone_takes_fewer_steps(world: World) -> None:
    world.add(1, job(30))
    world.finish()
    assert world.made[1] == expected(job(30))
    assert (world.guessing.steps, world.shared.steps) == (10, 0)


def test_company_comes_and_the_stream_goes_on_where_it_was(world: World) -> None:
    world.add(1, job(30))
    world.turn()
    world.add(2, job(5, (7,)))
    world.turn()
    assert world.shared.sequences[1].ids[:5] == [1, 2, *expected(job(3))]
    assert len(world.made[2]) == 1, "who comes is not kept waiting"
    world.finish()
    assert world.made == {1: expected(job(30)), 2: expected(job(5, (7,)))}
    assert world.guessing.steps == 1


def test_after_company_a_stream_is_alone_again_when_it_has_been_quiet(world: World) -> None:
    world.add(1, job(10))
    world.add(2, job(10))
    world.finish()
    world.add(3, job(10))
    world.finish()
    assert 3 in world.shared.sequences
    world.now += QUIET_S
    world.add(4, job(10))
    world.finish()
    assert 4 in world.guessing.sequences


def test_a_stream_that_is_cancelled_leaves_room_for_the_next(world: World) -> None:
    world.add(1, job(30))
    world.turn()
    world.handles.pop(1).cancel()
    world.add(2, job(30))
    world.finish()
    assert 2 in world.guessing.sequences
    assert world.made[2] == expected(job(30))


def test_one_that_is_cancelled_while_it_moves_does_not_come_back(world: World) -> None:
    world.add(1, job(30))
    world.add(2, job(30))
    world.handles.pop(1).cancel()
    world.finish()
    assert 1 not in world.shared.sequences
    assert world.made == {1: [], 2: expected(job(30))}


def test_a_very_long_answer_moves(world: World) -> None:
    asked = job(MOST_TOKENS + 100)
    world.add(1, asked)
    world.finish()
    assert world.made[1] == expected(asked)
    assert 1 in world.shared.sequences


@pytest.mark.parametrize(
    "other",
    [
        replace(job(), sampling=Sampling(30, temperature=0.5)),
        replace(job(), sampling=Sampling(30, repetition_penalty=1.1)),
        replace(job(), sampling=Sampling(30, presence_penalty=0.1)),
        replace(job(), sampling=Sampling(30, frequency_penalty=0.1)),
        replace(job(), sampling=Sampling(30, logprobs=True)),
        replace(job(), sampling=Sampling(30, grammar=Grammar(GrammarKind.REGEX, "a*"))),
        job(30, [1] * (PROMPT_TOKENS + 1)),
        job(1),
    ],
)
def test_what_guesses_would_change_or_not_help_is_left_to_the_shared_runtime(
    world: World, other: Job
) -> None:
    assert suits(job())
    assert suits(replace(job(), sampling=Sampling(30, seed=3, top_p=0.5, top_k=4, min_p=0.1)))
    assert not suits(other)
    world.add(1, other)
    assert 1 in world.shared.sequences


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "short", "sampled", "cancel", "turn", "quiet"]), st.integers(1, 60)
        ),
        max_size=40,
    )
)
def test_whoever_comes_and_goes_answers_are_the_same(events: list[tuple[str, int]]) -> None:
    world, asked = World(), dict[int, Job]()
    for number, (what, value) in enumerate(events):
        if what == "turn":
            world.turn()
        elif what == "quiet":
            world.now += QUIET_S
        elif what == "cancel" and world.handles:
            chosen = list(world.handles)[value % len(world.handles)]
            world.handles.pop(chosen).cancel()
            del asked[chosen]
        elif what in ("add", "short", "sampled"):
            tokens = 1 if what == "short" else value
            asked[number] = Job(0, [number], Sampling(tokens, temperature=float(what == "sampled")))
            world.add(number, asked[number])
    world.finish()
    assert {number: world.made[number] for number in asked} == {n: expected(j) for n, j in asked.items()}
