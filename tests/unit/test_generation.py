"""Many callers, one run: who joins, who leaves, who is slow, what fails, and what is counted in the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.discovery import VersionKey
from services.core.errors import BackendUnavailable, DeadlinePassed, InvalidInput, QueueFull
from services.inference import figures as names
from services.inference.admission import Admission
from services.inference.answers import Answers
from services.inference.backends.jobs import Finish
from services.inference.callers import Caller, Priority
from services.inference.figures import Figures
from services.inference.generation import Generation
from services.inference.text import Delta, GenerateJob
from tests.fakes import PROMPT_TOKENS, FakeText
from tests.waiting import pause, until

JOB = GenerateJob("hello", (), max_tokens=5)
WHOLE = "0 1 2 3 4 "


class Desk:
    """A generation over a fake model."""

    def __init__(
        self, slots: int = 4, queue: int = 100, mib: float = 1, labels: dict[str, str] | None = None
    ):
        self.charged: list[tuple[str, str, int]] = []
        self.figures = Figures(charge=lambda *used: self.charged.append(used))
        self.admission = Admission(slots, queue, self.figures)
        self.answers = Answers(int(mib * (1 << 20)))
        self.generation = Generation(self.admission, self.answers, self.figures, lambda key: labels or {})
        self.model = FakeText()

    async def ask(self, job: GenerateJob = JOB, caller: Caller | None = None) -> list[Delta]:
        async with aclosing(self.generation.generate(self.model, job, caller or Caller())) as deltas:
            return [delta async for delta in deltas]

    def asked(self, job: GenerateJob = JOB, caller: Caller | None = None) -> asyncio.Task[list[Delta]]:
        return asyncio.create_task(self.ask(job, caller))

    def count(self, name: str, **labels: str) -> float:
        return self.figures.total(name, **labels)

    def assert_idle(self) -> None:
        assert not self.model.active
        assert not self.generation._live
        assert not self.generation._joinable
        assert (self.count(names.RUNNING), self.count(names.QUEUE_LENGTH)) == (0, 0)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    async with desk.generation.serving(lambda: {desk.model.key}):
        yield desk
        await turn(20)
        desk.assert_idle()


async def turn(times: int = 10) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def due(seconds: float) -> Caller:
    return Caller(deadline=time.monotonic() + seconds)


# --- One run for all ----------------------------------------------------------------------------------


async def test_a_hundred_at_once_cost_one_run(desk: Desk) -> None:
    answers = await asyncio.gather(*[desk.ask() for _ in range(100)])
    assert {text(deltas) for deltas in answers} == {WHOLE}
    assert {(d[-1].finish, d[-1].prompt_tokens, d[-1].completion_tokens) for d in answers} == {
        (Finish.LENGTH, PROMPT_TOKENS, 5)
    }
    assert [deltas[-1].cached for deltas in answers].count(False) == 1
    assert len(desk.model.runs) == 1
    assert desk.count(names.CACHE_MISSES) == 1
    assert desk.count(names.CACHE_JOINED) == 99
    assert desk.count(names.GENERATED_TOKENS) == 5
    assert desk.count(names.PROMPT_TOKENS) == PROMPT_TOKENS
    assert desk.count(names.REQUESTS, outcome="ok") == 100


async def test_what_was_answered_once_comes_from_the_cache(desk: Desk) -> None:
    await desk.ask()
    again = await desk.ask()
    assert again == [Delta(WHOLE, Finish.LENGTH, PROMPT_TOKENS, 5, cached=True)]
    assert len(desk.model.runs) == 1
    assert desk.count(names.CACHE_HITS) == 1
    assert desk.count(names.CACHE_BYTES) > 0
    assert desk.count(names.GENERATED_TOKENS) == 5


async def test_who_comes_late_gets_what_has_come_and_follows(desk: Desk) -> None:
    desk.model.held = True
    first = desk.asked()
    await turn()
    desk.model.go(3)
    await turn()
    async with aclosing(desk.generation.generate(desk.model, JOB, Caller())) as late:
        assert (await anext(late)) == Delta("0 1 2 ", cached=True)
        desk.model.go(1)
        assert (await anext(late)) == Delta("3 ", cached=True)
        desk.model.go(1)
        assert (await anext(late)).finish
    assert text(await first) == WHOLE
    assert len(desk.model.runs) == 1


async def test_a_slow_reader_slows_nobody_and_gets_all(desk: Desk) -> None:
    async with aclosing(desk.generation.generate(desk.model, JOB, Caller())) as slow:
        got = [await anext(slow)]
        assert text(await desk.ask()) == WHOLE
        got += [delta async for delta in slow]
    assert text(got) == WHOLE
    assert len(got) == 2  # the rest came as one
    assert not desk.model.active


async def test_several_candidates_are_shared_and_kept(desk: Desk) -> None:
    job = replace(JOB, n=3)
    answers = await asyncio.gather(*[desk.ask(job) for _ in range(3)], desk.ask())
    answers.append(await desk.ask(job))
    for deltas in (*answers[:3], answers[4]):
        assert [text([d for d in deltas if d.index == i]) for i in range(3)] == [WHOLE] * 3
        assert deltas[-1].completion_tokens == 15
    assert len(answers[4]) == 3
    assert len(desk.model.runs) == 2


# --- Who does not share -------------------------------------------------------------------------------


async def test_clients_do_not_share_unless_the_model_is_marked() -> None:
    for labels, runs in (({}, 2), ({"lingqu.cache": "private"}, 2), ({"lingqu.cache": "shared"}, 1)):
        desk = Desk(labels=labels)
        callers = [Caller(client) for client in "aabb"]
        await asyncio.gather(*[desk.ask(caller=caller) for caller in callers])
        await asyncio.gather(*[desk.ask(caller=caller) for caller in callers])
        assert len(desk.model.runs) == runs


@pytest.mark.parametrize("fields", [{"cached": False}, {"temperature": 0.7}])
async def test_what_is_not_to_be_kept_is_computed_each_time(desk: Desk, fields: dict[str, float]) -> None:
    job = replace(JOB, **fields)
    answers = await asyncio.gather(*[desk.ask(job) for _ in range(3)])
    assert len(desk.model.runs) == 3
    assert not any(delta.cached for deltas in answers for delta in deltas)
    assert not len(desk.answers)
    assert desk.count(names.CACHE_MISSES) == 0
    await desk.ask()
    assert not (await desk.ask(replace(JOB, cached=False)))[-1].cached


async def test_another_version_is_another_answer_and_gone_ones_are_forgotten(desk: Desk) -> None:
    await desk.ask()
    desk.model.key = VersionKey("fake", 2)
    assert not (await desk.ask())[-1].cached
    desk.generation.keep_only({VersionKey("fake", 2)})
    assert len(desk.answers) == 1
    assert (await desk.ask())[-1].cached


# --- Who leaves ---------------------------------------------------------------------------------------


async def test_the_run_outlives_who_began_it_and_ends_with_the_last(desk: Desk) -> None:
    desk.model.held = True
    first, second = desk.asked(), desk.asked()
    await turn()
    desk.model.go(2)
    await turn()
    first.cancel()
    await turn()
    assert desk.model.active == 1
    desk.model.go(1)
    await turn()
    second.cancel()
    await turn()
    assert not desk.model.active
    assert desk.count(names.WASTED_TOKENS, outcome="cancelled") == 3
    assert desk.count(names.GENERATED_TOKENS) == 3
    assert desk.count(names.PROMPT_TOKENS) == PROMPT_TOKENS
    assert desk.count(names.REQUESTS, outcome="cancelled") == 2
    # And the next one begins anew.
    desk.model.held = False
    assert text(await desk.ask()) == WHOLE
    assert len(desk.model.runs) == 2
    assert desk.count(names.WASTED_TOKENS) == 3


async def test_who_leaves_alone_wastes_nothing(desk: Desk) -> None:
    desk.model.held = True
    first, second = desk.asked(), desk.asked()
    await turn()
    first.cancel()
    await turn()
    desk.model.go(5)
    assert text(await second) == WHOLE
    assert desk.count(names.WASTED_TOKENS) == 0


async def test_nobody_joins_a_run_that_was_just_left(desk: Desk) -> None:
    """The cancelled run has not noticed yet when the next one asks the same."""
    desk.model.held = True
    first = desk.asked()
    await turn()
    first.cancel()
    await asyncio.sleep(0)
    second = desk.asked()
    await turn()
    desk.model.go(5)
    assert text(await second) == WHOLE
    assert len(desk.model.runs) == 2


async def test_leaving_before_anything_began_leaves_nothing(desk: Desk) -> None:
    for steps in range(4):
        task = desk.asked()
        await turn(steps)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await turn()
    desk.assert_idle()
    unread = desk.generation.generate(desk.model, JOB, Caller())
    await unread.aclose()


async def test_leaving_the_queue_leaves_nothing() -> None:
    desk = Desk(slots=1)
    desk.model.held = True
    running = desk.asked(replace(JOB, prompt="other"))
    await turn()
    waiting = [desk.asked() for _ in range(3)]
    await turn()
    assert desk.count(names.QUEUE_LENGTH) == 1
    for task in waiting:
        task.cancel()
    await turn()
    assert desk.count(names.QUEUE_LENGTH) == 0
    assert len(desk.model.runs) == 1
    running.cancel()
    await turn()
    desk.assert_idle()


async def test_who_has_the_whole_answer_may_leave_without_reading_the_end(desk: Desk) -> None:
    async with aclosing(desk.generation.generate(desk.model, JOB, Caller())) as deltas:
        async for delta in deltas:
            if delta.finish:
                break
    await turn()
    assert desk.count(names.REQUESTS, outcome="ok") == 1
    assert desk.count(names.WASTED_TOKENS) == 0
    assert (await desk.ask())[-1].cached


async def test_leaving_while_the_cache_replays_is_no_waste(desk: Desk) -> None:
    job = replace(JOB, n=2)
    await desk.ask(job)
    async with aclosing(desk.generation.generate(desk.model, job, Caller())) as deltas:
        await anext(deltas)
    assert desk.count(names.REQUESTS, outcome="cancelled") == 1
    assert desk.count(names.WASTED_TOKENS) == 0


# --- Deadlines ----------------------------------------------------------------------------------------


async def test_a_deadline_ends_computing(desk: Desk) -> None:
    desk.model.held = True
    task = desk.asked(caller=due(0.1))
    await turn()
    desk.model.go(2)
    with pytest.raises(DeadlinePassed):
        await task
    await turn()
    assert not desk.model.active
    assert desk.count(names.WASTED_TOKENS, outcome="deadline") == 2
    assert desk.count(names.REQUESTS, outcome="deadline") == 1


async def test_a_deadline_ends_a_stream_nobody_reads(desk: Desk) -> None:
    async with aclosing(desk.generation.generate(desk.model, JOB, due(0.05))) as deltas:
        await anext(deltas)
        await pause(0.06, "its deadline passes")
        with pytest.raises(DeadlinePassed):
            await anext(deltas)


async def test_who_has_an_earlier_deadline_leaves_alone(desk: Desk) -> None:
    """Though the run began with the earlier one."""
    desk.model.held = True
    early, late = desk.asked(caller=due(0.05)), desk.asked(caller=due(5))
    await turn()
    desk.model.go(2)
    with pytest.raises(DeadlinePassed):
        await early
    desk.model.go(3)
    assert text(await late) == WHOLE
    assert desk.count(names.WASTED_TOKENS) == 0


async def test_a_deadline_ends_waiting() -> None:
    desk = Desk(slots=1)
    desk.model.held = True
    running = desk.asked(replace(JOB, prompt="other"))
    await turn()
    with pytest.raises(DeadlinePassed):
        await desk.ask(caller=due(0.05))
    await turn()
    assert desk.count(names.QUEUE_LENGTH) == 0
    with pytest.raises(DeadlinePassed):
        await desk.ask(caller=due(-1))
    assert len(desk.model.runs) == 1
    running.cancel()
    await turn()
    desk.assert_idle()


# --- What fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (BackendUnavailable("Triton was lost"), "unavailable"),
        (InvalidInput("prompt", "too long"), "invalid"),
        (ValueError("a bug"), "failed"),
    ],
)
async def test_errors_reach_all_and_are_not_kept(desk: Desk, error: Exception, outcome: str) -> None:
    desk.model.error = error
    results = await asyncio.gather(*[desk.ask() for _ in range(5)], return_exceptions=True)
    assert results == [error] * 5
    assert desk.count(names.REQUESTS, outcome=outcome) == 5
    await turn()
    assert desk.count(names.WASTED_TOKENS, outcome=outcome) == 5
    desk.model.error = None
    assert text(await desk.ask()) == WHOLE


async def test_a_full_queue_refuses_all_who_ask_the_same_and_is_not_kept() -> None:
    desk = Desk(slots=1, queue=0)
    desk.model.held = True
    running = desk.asked(replace(JOB, prompt="other"))
    await turn()
    results = await asyncio.gather(*[desk.ask() for _ in range(3)], return_exceptions=True)
    assert [type(result) for result in results] == [QueueFull] * 3
    desk.model.go(5)
    await running
    desk.model.held = False
    assert text(await desk.ask()) == WHOLE
    desk.assert_idle()


async def test_a_stream_that_ends_too_early_is_not_kept(desk: Desk) -> None:
    class Short(FakeText):
        async def generate(self, job, tally=None):  # type: ignore[no-untyped-def]
            yield Delta("0 ")

    desk.model = Short()
    assert text(await desk.ask()) == "0 "
    assert not len(desk.answers)


async def test_stopping_ends_all_runs_and_tells_who_follows() -> None:
    desk = Desk(slots=1)
    desk.model.held = True
    async with desk.generation.serving(lambda: {desk.model.key}):
        tasks = [desk.asked(replace(JOB, prompt=f"{n % 2}")) for n in range(4)]
        await turn()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {BackendUnavailable}
    await turn()
    desk.assert_idle()


# --- Priorities ---------------------------------------------------------------------------------------


async def test_a_run_waits_as_urgently_as_the_most_urgent_who_waits_for_it() -> None:
    desk = Desk(slots=1)
    desk.model.held = True
    running = desk.asked(replace(JOB, prompt="running"), Caller("b", Priority.BATCH))
    await turn()
    batch = desk.asked(caller=Caller("b", Priority.BATCH))
    normal = desk.asked(replace(JOB, prompt="normal"), Caller("n", Priority.NORMAL))
    await turn()
    urgent = desk.asked(caller=Caller("b", Priority.INTERACTIVE))
    await turn()
    desk.model.held = False
    desk.model.go(5)
    await asyncio.gather(running, batch, normal, urgent)
    assert [run.job.prompt for run in desk.model.runs] == ["running", "hello", "normal"]


# --- Anything -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_whatever_callers_do_answers_are_whole_and_nothing_is_left(seed: int) -> None:
    """Sixty callers of four questions: cancelled, late, slow, out of time, refused, and a failing engine."""

    async def story() -> None:
        rng = random.Random(seed)
        desk = Desk(slots=rng.randint(1, 4), queue=rng.randint(0, 8), mib=rng.choice([0, 1]))

        async def one() -> str | None:
            await asyncio.sleep(rng.random() * 0.004)
            job = replace(JOB, prompt=rng.choice("abcd"), n=rng.choice([1, 1, 2]), cached=rng.random() < 0.9)
            deadline = rng.choice([None, time.monotonic() + rng.random() * 0.004])
            who = Caller(rng.choice("xy"), rng.choice(list(Priority)), deadline)
            got: list[Delta] = []
            async with aclosing(desk.generation.generate(desk.model, job, who)) as deltas:
                async for delta in deltas:
                    got.append(delta)
                    if rng.random() < 0.2:
                        await asyncio.sleep(rng.random() * 0.001)
            assert got[-1].completion_tokens == 5 * job.n
            assert len({d.cached for d in got}) == 1
            for index in range(job.n):
                assert text([d for d in got if d.index == index]) == WHOLE
            return None

        tasks = [asyncio.create_task(one()) for _ in range(60)]
        for task in rng.sample(tasks, 25):
            await asyncio.sleep(rng.random() * 0.0003)
            desk.model.error = BackendUnavailable("lost") if rng.random() < 0.2 else None
            task.cancel()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        allowed = (type(None), asyncio.CancelledError, DeadlinePassed, QueueFull, BackendUnavailable)
        assert not [result for result in results if not isinstance(result, allowed)]
        await turn(20)
        desk.assert_idle()
        assert desk.count(names.REQUESTS) <= 60
        assert desk.count(names.WASTED_TOKENS) <= desk.count(names.GENERATED_TOKENS)
        assert desk.count(names.GENERATED_TOKENS) == sum(run.made for run in desk.model.runs)

    asyncio.run(story())


async def test_tokens_are_charged_to_whoever_made_them_be_computed() -> None:
    desk = Desk()
    await desk.ask(caller=Caller("alice"))
    await desk.ask(caller=Caller("alice"))  # kept
    assert desk.charged == [("alice", "fake", PROMPT_TOKENS + 5)]


async def test_tokens_of_an_answer_that_nobody_waited_for_are_charged_too() -> None:
    desk = Desk()
    deltas = desk.generation.generate(desk.model, replace(JOB, max_tokens=10_000), Caller("alice"))
    async for _ in deltas:
        break
    await deltas.aclose()
    await until(lambda: bool(desk.charged), "it is charged")
    assert desk.charged[0][2] > PROMPT_TOKENS
