"""Admission with tasks and clocks: what is refused, what times out, and that no slot is ever lost."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.discovery import VersionKey
from services.core.errors import DeadlinePassed, QueueFull
from services.inference.admission import LEAST_RETRY_S, MOST_RETRY_S, Admission
from services.inference.callers import Caller, Priority
from services.inference.fairqueue import Ticket
from services.inference.figures import ADMITTED, QUEUE_LENGTH, QUEUE_SECONDS, REQUESTS, RUNNING, Figures
from tests.waiting import pause, until

KEY = VersionKey("m", 1)


def due(seconds: float, client: str = "") -> Caller:
    return Caller(client, deadline=time.monotonic() + seconds)


class Desk:
    """An admission, its figures, and callers that hold their slot until they are told."""

    def __init__(self, slots: int = 1, queue: int = 10) -> None:
        self.figures = Figures()
        self.admission = Admission(slots, queue, self.figures)

    async def hold(self, release: asyncio.Event, caller: Caller | None = None, n: int = 1) -> None:
        async with self.admission.slot(KEY, caller or Caller(), n):
            await release.wait()

    @property
    def now(self) -> tuple[float, float]:
        return self.figures.total(RUNNING), self.figures.total(QUEUE_LENGTH)


async def turn(times: int = 3) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def test_the_queue_bounds_and_says_when_to_come_back() -> None:
    desk, release = Desk(slots=2, queue=3), asyncio.Event()
    tasks = [asyncio.create_task(desk.hold(release)) for _ in range(5)]
    await turn()
    assert desk.now == (2, 3)
    with pytest.raises(QueueFull) as refused:
        await desk.hold(release)
    assert refused.value.retry_after_s is not None
    assert LEAST_RETRY_S <= refused.value.retry_after_s <= MOST_RETRY_S
    release.set()
    await asyncio.gather(*tasks)
    assert desk.now == (0, 0)
    assert desk.figures.total(ADMITTED) == 5
    assert desk.figures.total(QUEUE_SECONDS) > 0


async def test_when_to_come_back_is_measured() -> None:
    """Three wait for one slot, and each holds it for so long."""
    desk, release = Desk(slots=1, queue=3), asyncio.Event()
    async with desk.admission.slot(KEY, Caller()):
        await pause(0.2, "what a request takes")
    tasks = [asyncio.create_task(desk.hold(release)) for _ in range(4)]
    await turn()
    with pytest.raises(QueueFull) as refused:
        await desk.hold(release)
    assert 0.6 <= (refused.value.retry_after_s or 0) <= 1.2
    release.set()
    await asyncio.gather(*tasks)


async def test_a_deadline_ends_the_waiting_and_leaves_nothing() -> None:
    desk, release = Desk(), asyncio.Event()
    running = asyncio.create_task(desk.hold(release))
    await turn()
    began = time.monotonic()
    with pytest.raises(DeadlinePassed):
        await desk.hold(release, due(0.1))
    assert 0.09 < time.monotonic() - began < 0.5
    assert desk.now == (1, 0)
    release.set()
    await running
    assert desk.now == (0, 0)


async def test_a_deadline_that_has_passed_takes_no_slot() -> None:
    desk = Desk()
    with pytest.raises(DeadlinePassed):
        await desk.hold(asyncio.Event(), due(-1))
    assert desk.now == (0, 0)


async def test_who_is_cancelled_while_waiting_leaves_nothing_and_the_next_goes_on() -> None:
    desk, first, last = Desk(), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(desk.hold(first))
    waiting, next_one = [asyncio.create_task(desk.hold(last)) for _ in range(2)]
    await turn()
    waiting.cancel()
    await turn()
    assert desk.now == (1, 1)
    first.set()
    await running
    await turn()
    assert desk.now == (1, 0)
    last.set()
    await next_one
    assert waiting.cancelled()


async def test_who_is_cancelled_just_when_its_turn_comes_gives_the_slot_on() -> None:
    desk, first, last = Desk(), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(desk.hold(first))
    waiting, next_one = [asyncio.create_task(desk.hold(last)) for _ in range(2)]
    await turn()
    waiting.cancel()  # in the same step as the slot comes free, before and after
    running.cancel()
    await turn()
    assert desk.now == (1, 0)
    next_one.cancel()
    await asyncio.gather(running, waiting, next_one, return_exceptions=True)
    assert desk.now == (0, 0)


async def test_a_flood_of_one_client_gives_way_to_another() -> None:
    desk, release = Desk(slots=1, queue=4), asyncio.Event()
    flood = [asyncio.create_task(desk.hold(release, Caller("flood"))) for _ in range(5)]
    await turn()
    other = asyncio.create_task(desk.hold(release, Caller("other")))
    await turn()
    assert [task.done() for task in flood] == [False] * 4 + [True]
    with pytest.raises(QueueFull):
        await flood[-1]
    release.set()
    await asyncio.gather(*flood[:-1], other)
    assert desk.now == (0, 0)


async def test_versions_do_not_wait_for_each_other() -> None:
    desk, release = Desk(slots=1), asyncio.Event()
    held = asyncio.create_task(desk.hold(release))
    await turn()
    async with desk.admission.slot(VersionKey("m", 2), Caller()):
        assert desk.figures.total(RUNNING, version="2") == 1
    release.set()
    await held


async def test_versions_that_are_gone_are_forgotten_once_they_are_idle() -> None:
    desk, release = Desk(), asyncio.Event()
    held = asyncio.create_task(desk.hold(release))
    await turn()
    desk.admission.keep_only(())
    assert desk.admission.busy(KEY)
    assert desk.now == (1, 0)
    release.set()
    await held
    assert not desk.admission.busy(KEY)
    desk.admission.keep_only({KEY})
    assert desk.figures.snapshot()[-1].name == RUNNING
    desk.admission.keep_only(())
    assert not any(figure.name in (RUNNING, QUEUE_LENGTH) for figure in desk.figures.snapshot())


async def test_a_ticket_is_hastened_before_and_while_it_waits() -> None:
    desk, order, release = Desk(), list[str](), asyncio.Event()
    early = Ticket("e", Priority.BATCH)
    desk.admission.hasten(KEY, early, Priority.INTERACTIVE)
    assert early.priority is Priority.INTERACTIVE

    async def held(name: str, ticket: Ticket) -> None:
        async with desk.admission.held(KEY, ticket):
            order.append(name)

    first = asyncio.create_task(desk.hold(release))
    await turn()
    tickets = {"normal": Ticket("a", Priority.NORMAL), "hastened": Ticket("b", Priority.BATCH)}
    tasks = [asyncio.create_task(held(*item)) for item in tickets.items()]
    await turn()
    desk.admission.hasten(KEY, tickets["hastened"], Priority.INTERACTIVE)
    release.set()
    await asyncio.gather(first, *tasks)
    assert order == ["hastened", "normal"]


async def test_requests_are_counted_by_how_they_end() -> None:
    desk = Desk()

    async def ended(caller: Caller, work: float, error: Exception | None = None) -> None:
        async with desk.admission.request(KEY, caller):
            await asyncio.sleep(work)
            if error is not None:
                raise error

    await ended(Caller(), 0)
    for error in (ValueError(), QueueFull("")):
        with pytest.raises(type(error)):
            await ended(Caller(), 0, error)
    cancelled, late = (asyncio.create_task(ended(caller, 10)) for caller in (Caller(), due(0.05)))
    await turn()
    cancelled.cancel()
    await asyncio.wait([cancelled, late], timeout=5)
    for outcome in ("cancelled", "deadline"):
        assert desk.figures.total(REQUESTS, outcome=outcome) == 1
    counts = {o: desk.figures.total(REQUESTS, outcome=o) for o in ("ok", "failed", "refused")}
    assert counts == {"ok": 1, "failed": 1, "refused": 1}


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 2**32))
def test_no_slot_leaks_whatever_becomes_of_the_callers(slots: int, queue: int, seed: int) -> None:
    """A hundred callers of five clients: some end, some fail, some are cancelled, some run out of time."""

    async def story() -> None:
        rng, desk, running = random.Random(seed), Desk(slots, queue), 0

        async def one() -> None:
            nonlocal running
            await asyncio.sleep(rng.random() * 0.01)
            n = rng.randint(1, 3)
            timeout = rng.choice([None, rng.random() * 0.01])
            deadline = None if timeout is None else time.monotonic() + timeout
            who = Caller(rng.choice("abcde"), rng.choice(list(Priority)), deadline)
            async with desk.admission.slot(KEY, who, n):
                running += min(n, slots)
                assert running <= slots
                try:
                    await asyncio.sleep(rng.random() * 0.002)
                    if rng.random() < 0.1:
                        raise ValueError("failed")
                finally:
                    running -= min(n, slots)

        tasks = [asyncio.create_task(one()) for _ in range(100)]
        for task in rng.sample(tasks, 40):
            await asyncio.sleep(rng.random() * 0.0005)
            task.cancel()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        unexpected = [
            r
            for r in results
            if not isinstance(
                r, type(None) | DeadlinePassed | QueueFull | ValueError | asyncio.CancelledError
            )
        ]
        assert not unexpected
        assert desk.now == (0, 0)
        desk.admission.keep_only(())
        assert not desk.admission._lanes
        async with desk.admission.slot(KEY, Caller(), slots):  # all of them are there
            assert desk.now == (slots, 0)

    asyncio.run(story())


async def test_a_deadline_ends_the_work_and_other_timeouts_are_what_they_are() -> None:
    desk = Desk()
    with pytest.raises(DeadlinePassed):
        async with desk.admission.request(KEY, due(0.05)):
            await asyncio.sleep(5)
    with pytest.raises(TimeoutError):
        async with desk.admission.request(KEY, due(5)):
            raise TimeoutError
    assert desk.now == (0, 0)
    assert [desk.figures.total(REQUESTS, outcome=o) for o in ("deadline", "failed")] == [1, 1]


async def test_figures_keep_so_many_versions_only() -> None:
    desk = Desk()
    for number in range(1, 300):
        async with desk.admission.request(VersionKey("m", number), Caller()):
            pass
        desk.admission.keep_only(())
    versions = {figure.labels["version"] for figure in desk.figures.snapshot()}
    assert len(versions) == 128
    assert "299" in versions
    await until(lambda: not desk.admission._lanes, "no lane is left")
