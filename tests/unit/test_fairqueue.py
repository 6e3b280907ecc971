"""The rule of admission: its bounds, its order, and that nothing is lost or kept, whatever happens."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.callers import Priority
from services.inference.fairqueue import FairQueue, State, Ticket

INTERACTIVE, NORMAL, BATCH = Priority


def enter(line: FairQueue, client: str, priority: Priority = NORMAL, slots: int = 1) -> Ticket:
    ticket = Ticket(client, priority, slots)
    line.arrive(ticket)
    line.start()
    return ticket


def served(line: FairQueue, holder: Ticket, most: int = 10_000) -> list[Ticket]:
    """Who gets the only slot after `holder`, one after the other, until nobody waits."""
    order: list[Ticket] = []
    while line.waiting and len(order) < most:
        line.leave(holder)
        (holder,) = line.start()
        order.append(holder)
    line.leave(holder)
    return order


def test_up_to_its_slots_all_run_and_then_they_wait_and_then_they_are_refused() -> None:
    line = FairQueue(slots=2, queue=2)
    states = [enter(line, "a").state for _ in range(5)]
    assert states == [State.RUNNING] * 2 + [State.WAITING] * 2 + [State.GONE]


def test_shares_of_the_classes() -> None:
    line = FairQueue(slots=1, queue=1000)
    holder = enter(line, "x")
    for _ in range(300):
        for priority in Priority:
            enter(line, "a", priority)
    order = served(line, holder, most=210)
    shares = Counter(t.priority for t in order)
    assert abs(shares[INTERACTIVE] - 160) <= 1
    assert abs(shares[NORMAL] - 40) <= 1
    assert abs(shares[BATCH] - 10) <= 1
    # Not in blocks: every 21 in a row are shared so.
    for start in range(0, 189, 7):
        window = Counter(t.priority for t in order[start : start + 21])
        assert abs(window[INTERACTIVE] - 16) <= 1
        assert window[BATCH] in (0, 1, 2)


def test_a_class_that_was_away_saves_nothing_up() -> None:
    line = FairQueue(slots=1, queue=1000)
    holder = enter(line, "x")
    for _ in range(200):
        enter(line, "a", NORMAL)
    for _ in range(100):
        line.leave(holder)
        (holder,) = line.start()
    for _ in range(100):
        enter(line, "a", BATCH)
    order = served(line, holder, most=50)
    assert Counter(t.priority for t in order)[BATCH] in range(9, 12)


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    line = FairQueue(slots=1, queue=1000)
    holder = enter(line, "x")
    tickets = {client: [enter(line, client) for _ in range(5)] for client in "abc"}
    order = served(line, holder)
    assert [t.client for t in order] == list("abc") * 5
    for client, own in tickets.items():
        assert [t for t in order if t.client == client] == own


def test_who_comes_late_is_next_and_does_not_wait_behind_a_long_queue() -> None:
    line = FairQueue(slots=1, queue=1000)
    holder = enter(line, "x")
    for _ in range(500):
        enter(line, "greedy")
    late = enter(line, "late")
    assert late in served(line, holder)[:3]


def test_a_full_queue_has_a_place_for_everybody() -> None:
    line = FairQueue(slots=1, queue=10)
    enter(line, "x")
    greedy = [enter(line, "greedy") for _ in range(10)]
    modest = [enter(line, "modest", BATCH) for _ in range(6)]
    assert [t.state for t in modest] == [State.WAITING] * 5 + [State.GONE]
    # The newest gave way.
    assert [t.state for t in greedy] == [State.WAITING] * 5 + [State.GONE] * 5
    # And claiming a priority takes no place from others.
    assert enter(line, "greedy", INTERACTIVE).state is State.WAITING
    assert [t.state for t in modest].count(State.WAITING) == 5
    assert [t.state for t in greedy].count(State.WAITING) == 4


def test_nobody_gives_way_to_somebody_who_would_then_have_more() -> None:
    line = FairQueue(slots=1, queue=1)
    enter(line, "x")
    first = enter(line, "a")
    assert enter(line, "b").state is State.GONE
    assert first.state is State.WAITING


def test_a_client_gives_up_its_own_batch_for_something_urgent() -> None:
    line = FairQueue(slots=1, queue=3)
    enter(line, "x")
    batch = [enter(line, "a", BATCH) for _ in range(3)]
    urgent = [enter(line, "a", INTERACTIVE) for _ in range(4)]
    assert [t.state for t in batch] == [State.GONE] * 3
    assert [t.state for t in urgent] == [State.WAITING] * 3 + [State.GONE]


def test_many_slots_are_waited_for_and_not_overtaken() -> None:
    line = FairQueue(slots=4, queue=100)
    running = [enter(line, "a") for _ in range(4)]
    wide, narrow = enter(line, "b", slots=3), enter(line, "c")
    for ticket in running[:2]:
        line.leave(ticket)
        assert not line.start()
    line.leave(running[2])
    assert line.start() == [wide]
    line.leave(running[3])
    assert line.start() == [narrow]


def test_more_slots_than_there_are_is_all_of_them() -> None:
    line = FairQueue(slots=4, queue=100)
    ticket = enter(line, "a", slots=8)
    assert (ticket.state, line.taken) == (State.RUNNING, 4)
    line.leave(ticket)
    assert line.idle


def test_hastened_tickets_change_their_class() -> None:
    line = FairQueue(slots=1, queue=100)
    holder = enter(line, "x")
    for _ in range(30):
        enter(line, "a", INTERACTIVE)
    slow = enter(line, "b", BATCH)
    line.hasten(slow, INTERACTIVE)
    line.hasten(slow, BATCH)  # never back
    assert slow in served(line, holder)[:2]


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=40), st.integers(0, 2**32))
def test_nobody_starves_however_many_others_come(clients: list[str], seed: int) -> None:
    """A batch request behind others of its class, while interactive ones never cease to come."""
    rng = random.Random(seed)
    line = FairQueue(slots=1, queue=10_000)
    holder = enter(line, "x")
    for client in clients:
        enter(line, client, BATCH)
    mine = enter(line, "mine", BATCH)
    before = len(set(clients)) + 1  # turns until it is mine's
    for _ in range(21 * (before + 1)):
        enter(line, rng.choice(["p", "q", "a"]), INTERACTIVE)
        enter(line, rng.choice(["p", "q", "a"]), NORMAL)
        line.leave(holder)
        (holder,) = line.start()
        if holder is mine:
            return
    pytest.fail("the batch request was starved")


ACTIONS = st.one_of(
    st.tuples(
        st.just("arrive"),
        st.sampled_from(["a", "b", "c", "d"]),
        st.sampled_from(list(Priority)),
        st.integers(1, 9),
    ),
    st.tuples(st.just("leave"), st.integers(0, 60)),
    st.tuples(st.just("hasten"), st.integers(0, 60), st.sampled_from(list(Priority))),
)


@given(st.integers(1, 6), st.integers(0, 8), st.lists(ACTIONS, max_size=120))
def test_bounds_hold_and_nothing_leaks(slots: int, queue: int, actions: list[tuple]) -> None:
    """A model that knows nothing of the rule keeps the books; tickets leave in any state, and twice."""
    line, tickets = FairQueue(slots, queue), list[Ticket]()
    for action in actions:
        if action[0] == "arrive":
            ticket = Ticket(action[1], action[2], action[3])
            tickets.append(ticket)
            before = Counter(t.client for t in tickets if t.state is State.WAITING)
            out = line.arrive(ticket)
            if out is not None and out.client != ticket.client:
                assert before[out.client] == max(before.values())
                assert before[out.client] > before[ticket.client] + 1
            if out is not None:
                assert sum(before.values()) >= queue
        elif tickets and action[0] == "leave":
            line.leave(tickets[action[1] % len(tickets)])
        elif tickets:
            line.hasten(tickets[action[1] % len(tickets)], action[2])
        started = line.start()
        assert all(t.state is State.RUNNING for t in started)
        states = Counter(t.state for t in tickets)
        assert line.taken == sum(t.slots for t in tickets if t.state is State.RUNNING) <= slots
        assert line.waiting == states[State.WAITING] <= queue
        assert line.clients == len({t.client for t in tickets if t.state is State.WAITING})
        assert sum(line.length(p) for p in Priority) == line.waiting
        # No slot is kept back from those who need one only.
        if line.waiting and all(t.slots == 1 for t in tickets if t.state is State.WAITING):
            assert line.taken == slots
    for ticket in tickets:
        line.leave(ticket)
        line.start()
    while running := [t for t in tickets if t.state is State.RUNNING]:
        for ticket in running:
            line.leave(ticket)
        line.start()
    assert line.idle
    assert not line.clients
    assert not any(line._classes.values())
