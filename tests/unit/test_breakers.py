"""When breakers open, and that they close again by themselves."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.core.discovery import Model, Protection
from services.gateway.breakers import (
    HOLD_MOST_S,
    HOLD_S,
    WINDOW_S,
    Breaker,
    Breakers,
    Load,
    Phase,
    Rule,
    advanced,
    shares,
)
from services.gateway.view import Target, View

RULE = Rule(error_percent=50, min_requests=20)
GOOD, BAD = Load(ended=10), Load(ended=10, failed=10)
loads = st.builds(
    lambda good, bad, busy, running: Load(good + bad, bad, busy, running),
    st.integers(0, 30),
    st.integers(0, 30),
    st.floats(0, 100),
    st.integers(0, 30),
)
rules = st.builds(Rule, st.integers(1, 100), st.integers(1, 50), st.sampled_from([0.0, 0.5]))


def run(
    reports: list[Load], rule: Rule = RULE, breaker: Breaker | None = None, at: float = 0.0
) -> list[Breaker]:
    """The breaker after each report, one a second."""
    found = [breaker or Breaker()]
    for second, load in enumerate(reports, 1):
        found.append(advanced(found[-1], load, at + second, rule))
    return found


@given(st.lists(loads, max_size=40), rules)
def test_nothing_opens_without_enough_requests_that_say_so(reports: list[Load], rule: Rule) -> None:
    found = run(reports, rule)
    for second, (before, after) in enumerate(itertools.pairwise(found), 1):
        if before.phase is Phase.CLOSED and after.phase is Phase.OPEN:
            window = reports[max(0, second - int(WINDOW_S)) : second]
            assert sum(load.ended for load in window) + window[-1].running >= rule.min_requests
            assert sum(load.failed for load in window) or rule.latency_s
            assert after.reason


@given(st.lists(loads, max_size=40), rules)
def test_whatever_happened_it_closes_when_all_is_well(reports: list[Load], rule: Rule) -> None:
    broken = run(reports, rule)[-1]
    well = run([Load(ended=10)] * int(HOLD_MOST_S + 2 * WINDOW_S), rule, broken, at=len(reports))
    assert well[-1].phase is Phase.CLOSED
    silence = run([Load()] * int(HOLD_MOST_S + 2 * WINDOW_S), rule, broken, at=len(reports))
    assert silence[-1].phase is Phase.CLOSED


@given(st.lists(loads, max_size=60), rules)
def test_open_for_a_bounded_time_and_never_straight_to_closed(reports: list[Load], rule: Rule) -> None:
    found = run(reports, rule)
    for before, after in itertools.pairwise(found):
        assert (before.phase, after.phase) != (Phase.OPEN, Phase.CLOSED)
        assert (before.phase, after.phase) != (Phase.CLOSED, Phase.HALF_OPEN)
        if after.phase is Phase.OPEN and before.phase is not Phase.OPEN:
            assert HOLD_S <= after.until - after.since <= HOLD_MOST_S


@given(st.lists(loads, max_size=40))
def test_one_that_is_off_never_opens(reports: list[Load]) -> None:
    assert all(breaker == Breaker() for breaker in run(reports, Rule(1, 1, 0.001, off=True)))


def test_it_opens_on_failures_holds_tries_and_opens_for_longer() -> None:
    found = run([BAD] * 40)
    phases = [breaker.phase for breaker in found]
    assert phases[:6] == [Phase.CLOSED, Phase.CLOSED, Phase.OPEN, Phase.OPEN, Phase.HALF_OPEN, Phase.OPEN]
    assert found[2].reason == "20 of 20 requests failed"
    assert found[5].until - found[5].since == 2 * HOLD_S
    assert run([GOOD], RULE, found[4], at=4)[-1].phase is Phase.CLOSED


def test_it_opens_on_latency_whether_requests_end_or_hang() -> None:
    rule = Rule(min_requests=20, latency_s=0.5)
    assert run([Load(ended=20, busy_s=9.0)] * 3, rule)[-1].phase is Phase.CLOSED
    assert run([Load(ended=20, busy_s=11.0)], rule)[-1].reason.startswith("requests take 0.55 s")
    assert run([Load(running=30, busy_s=30.0)], rule)[-1].phase is Phase.OPEN
    assert run([Load(running=30, busy_s=30.0)] * 5, RULE)[-1].phase is Phase.CLOSED


def target(version: int, *endpoints: str) -> Target:
    return Target("m", version, "generate", endpoints, (), False)


def test_breakers_tell_what_has_changed_and_forget_what_is_gone() -> None:
    breakers, one = Breakers(), target(1, "a:1")
    models = (Model("m", (), protection=Protection(min_requests=5)),)
    now = View((one, target(2, "b:1")), (), models=models)
    changed = breakers.advance({("m", 1): BAD, ("x", 1): BAD}, now, 1.0)
    assert [(t.version, breaker.phase) for t, breaker in changed] == [(1, Phase.OPEN)]
    assert [t.admits for t in breakers.applied(now).targets] == [0, 100]
    assert breakers.advance({("m", 1): BAD}, now, 2.0) == []
    assert breakers.advance({}, View((), ()), 3.0) == []
    assert breakers.of("m", 1).phase is Phase.CLOSED


def test_other_replicas_are_tried_at_once() -> None:
    breakers, broken = Breakers(), View((target(1, "a:1"),), ())
    assert breakers.advance({("m", 1): Load(30, 30)}, broken, 1.0)
    again = View((target(1, "c:1"),), ())
    assert breakers.applied(broken).targets[0].admits == 0
    assert breakers.applied(again).targets[0].admits == 100
    breakers.advance({}, again, 2.0)
    assert breakers.of("m", 1).phase is Phase.CLOSED


@given(st.lists(st.tuples(st.integers(1, 100), st.sampled_from([0, 20, 100])), min_size=1, max_size=4))
def test_requests_are_refused_only_when_no_breaker_is_closed(given_: list[tuple[int, int]]) -> None:
    got, refused = shares(given_)
    assert (refused > 0) == all(admits < 100 for _, admits in given_)
    assert all((share > 0) == (admits > 0) for share, (_, admits) in zip(got, given_, strict=True))
