"""What becomes of alerts, whatever is measured and whatever the clock does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.metrics.alerts.questions import Reading
from services.metrics.alerts.rules import Comparison, Rule, Selection, Threshold
from services.metrics.alerts.states import (
    FLAP_HOLD_S,
    MAX_ALERTS,
    MAX_GAP_S,
    RESOLVED_KEPT_S,
    SECOND,
    Alert,
    State,
    evaluate,
    flapping,
)
from services.metrics.points import Labels

START = 1_790_000_000 * SECOND
RULE = Rule("r", Threshold(Selection("m"), 60, Comparison.ABOVE, 1.0), for_s=30, keep_firing_s=20)
ONE: Labels = (("model", "a"),)
Steps = list[tuple[float, bool | None]]

# Seconds since the step before, and whether the condition holds (None: nobody knows).
steps = st.lists(
    st.tuples(st.floats(0, 400), st.sampled_from([True, True, False, None])), min_size=1, max_size=60
)
rules = st.builds(
    lambda held, kept: replace(RULE, for_s=held, keep_firing_s=kept),
    st.sampled_from([0.0, 30.0, 300.0]),
    st.sampled_from([0.0, 20.0, 300.0]),
)


def played(rule: Rule, given_steps: Steps) -> list[tuple[int, bool | None, Alert | None]]:
    """Time, breach and the alert after each step."""
    alerts: dict[Labels, Alert] = {}
    now, found = START, []
    for after_s, breach in given_steps:
        now += int(after_s * SECOND)
        readings = None if breach is None else {ONE: Reading(2.0, breach)}
        alerts = dict(evaluate(rule, readings, alerts, now).alerts)
        found.append((now, breach, alerts.get(ONE)))
    return found


def state(alert: Alert | None) -> State:
    return alert.state if alert else State.INACTIVE


@given(rules, steps)
def test_it_fires_if_and_only_if_the_condition_held_for_long_enough(rule: Rule, given_steps: Steps) -> None:
    held_since, seen, before = None, None, State.INACTIVE
    for now, breach, alert in played(rule, given_steps):
        if breach is None:
            assert state(alert) is before
            continue
        gap = seen is not None and now - seen > MAX_GAP_S * SECOND
        seen = now
        if not breach:
            held_since = None
        elif held_since is None or (gap and before is not State.FIRING):
            held_since = now
        long_enough = held_since is not None and now - held_since >= rule.for_s * SECOND
        if before is not State.FIRING:
            assert (state(alert) is State.FIRING) == long_enough
        before = state(alert)


@given(rules, steps)
def test_it_resolves_only_after_it_was_clear_for_the_hold(rule: Rule, given_steps: Steps) -> None:
    clear_since, before = None, None
    for now, breach, alert in played(rule, given_steps):
        if breach is not None:
            clear_since = None if breach else clear_since or now
        if state(before) is State.FIRING and state(alert) is not State.FIRING:
            assert before is not None
            assert clear_since is not None
            hold_s = max(rule.keep_firing_s, FLAP_HOLD_S) if flapping(before, now) else rule.keep_firing_s
            assert now - clear_since >= hold_s * SECOND
            assert state(alert) is State.RESOLVED
        before = alert


@given(rules, steps, st.integers(-(10**6), 10**6))
def test_a_clock_that_steps_never_breaks_anything_and_renames_no_firing(
    rule: Rule, given_steps: Steps, step_s: int
) -> None:
    alerts = {ONE: found} if (found := played(rule, given_steps)[-1][2]) else {}
    now = START + step_s * SECOND
    for _ in range(4):
        after = evaluate(rule, {ONE: Reading(2.0, True)}, alerts, now).alerts
        if ONE in alerts and alerts[ONE].state is State.FIRING:
            assert after[ONE].state is State.FIRING
            assert after[ONE].fired_ns == alerts[ONE].fired_ns
        assert after[ONE].since_ns <= now
        alerts, now = dict(after), now + int(rule.for_s * SECOND) + 1
    assert alerts[ONE].state is State.FIRING


@given(rules, steps)
def test_what_is_over_is_forgotten(rule: Rule, given_steps: Steps) -> None:
    last = played(rule, given_steps)[-1]
    alerts, now = {ONE: last[2]} if last[2] else {}, last[0]
    for _ in range(6):
        now += 3600 * SECOND
        for _ in range(4):  # looked at often, or the time does not count as clear
            now += int(MAX_GAP_S / 2) * SECOND
            alerts = dict(evaluate(rule, {}, alerts, now).alerts)
    assert not alerts


def test_one_that_fires_three_times_within_the_hour_stays() -> None:
    rule = replace(RULE, for_s=0, keep_firing_s=0)
    blink: Steps = [(10, True), (10, False)]
    found = played(rule, blink * 3 + [(10, True), (300, False), (200, False), (10, True)] + blink)
    assert [state(alert) for *_, alert in found][:6] == [
        State.FIRING, State.RESOLVED, State.FIRING, State.RESOLVED, State.FIRING, State.FIRING
    ]  # fmt: skip
    assert all(state(alert) is State.FIRING for *_, alert in found[4:])
    quiet = played(rule, blink * 3 + [(FLAP_HOLD_S / 2, False), (FLAP_HOLD_S / 2, False)])
    assert state(quiet[-1][2]) is State.RESOLVED


def test_a_resolved_alert_is_shown_for_a_while() -> None:
    rule = replace(RULE, for_s=0, keep_firing_s=0)
    shown = played(rule, [(0, True), (1, False), (RESOLVED_KEPT_S - 1, False)])
    assert state(shown[-1][2]) is State.RESOLVED


@pytest.mark.parametrize("before", [0, 40, MAX_ALERTS])
def test_of_very_many_series_so_many_are_followed_and_the_rest_is_named(before: int) -> None:
    series = [(("client", f"c{number:05}"),) for number in range(2_000)]
    rule = replace(RULE, for_s=0, keep_firing_s=0)
    known = evaluate(
        rule, {labels: Reading(2, True) for labels in series[-before:]} if before else {}, {}, START
    )
    result = evaluate(rule, {labels: Reading(2, True) for labels in series}, known.alerts, START + SECOND)
    assert len(result.alerts) == MAX_ALERTS
    assert set(known.alerts) <= set(result.alerts)  # no alert makes room while it fires
    assert set(result.overflowed) == set(series) - set(result.alerts)
    calm = evaluate(rule, {}, result.alerts, START + 2 * SECOND)
    other = evaluate(rule, {series[1500]: Reading(2, True)}, calm.alerts, START + 3 * SECOND)
    assert other.alerts[series[1500]].state is State.FIRING  # but one that was resolved does
    assert len(other.alerts) == MAX_ALERTS
