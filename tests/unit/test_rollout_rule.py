"""What a rollout does next, case by case and for any course of events."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from lingqu.registry.v1 import rollouts_pb2 as pb
from services.registry import rollouts
from services.registry.rollouts import Move, Seen, decide

HEALTHY = Seen(timer=False, ready=1, stable_ready=1)
WAITING = Seen(timer=True, ready=1, stable_ready=1)


def rollout(steps: int = 2, **fields: object) -> pb.Rollout:
    plan = pb.RolloutPlan(
        steps=[pb.RolloutStep(percent=10 * (i + 1), wait=Duration(seconds=5)) for i in range(steps)]
    )
    return pb.Rollout(id="r", version=2, from_version=1, state=rollouts.RUNNING, plan=plan, **fields)  # type: ignore[arg-type]


def guarded(**report: object) -> pb.Rollout:
    found = rollout()
    found.plan.guards.add(metric="error_rate", max=0.02, min_samples=100)
    if report:
        found.report.CopyFrom(pb.VerdictReport(**report))  # type: ignore[arg-type]
    return found


def move(of: pb.Rollout, seen: Seen = HEALTHY) -> Move | None:
    found = decide(of, seen)
    return found[0] if found else None


def test_without_conditions_only_time_counts() -> None:
    assert move(rollout(), WAITING) is None
    assert move(rollout()) == Move.ADVANCE
    assert move(rollout(step=1)) == Move.FINISH


def test_a_verdict_of_fail_does_not_wait() -> None:
    failed = guarded(verdict=pb.VERDICT_FAIL, detail="labels differ")
    found = decide(failed, WAITING)
    assert found is not None
    assert found[0] == Move.BACK
    assert "labels differ" in found[1]


@pytest.mark.parametrize("value", [0.03, math.inf, math.nan])
def test_a_figure_out_of_its_guard_goes_back_once_there_are_samples(value: float) -> None:
    assert move(guarded(figures={"error_rate": value}, samples=100), WAITING) == Move.BACK
    assert move(guarded(figures={"error_rate": value}, samples=99), WAITING) is None


def test_a_guard_without_its_figure_holds_the_step_and_then_goes_back() -> None:
    held = guarded()
    assert move(held) == Move.AWAIT_VERDICT
    held.waited = True
    assert move(held, WAITING) is None
    assert move(held, HEALTHY) == Move.BACK
    good = guarded(figures={"error_rate": 0.0}, samples=100)
    assert move(good) == Move.ADVANCE
    good.waited = True
    assert move(good, WAITING) == Move.ADVANCE


def test_a_report_on_an_earlier_step_counts_no_more() -> None:
    old = guarded(figures={"error_rate": 0.0}, samples=100, step=0)
    old.step = 1
    assert move(old) == Move.AWAIT_VERDICT
    old.report.verdict = pb.VERDICT_FAIL
    assert move(old) == Move.AWAIT_VERDICT


def test_pass_is_waited_for_where_the_plan_asks() -> None:
    asked = rollout()
    asked.plan.require_pass = True
    assert move(asked) == Move.AWAIT_VERDICT
    asked.report.CopyFrom(pb.VerdictReport(verdict=pb.VERDICT_PASS))
    assert move(asked) == Move.ADVANCE


def test_a_version_that_died_alone_goes_back() -> None:
    assert move(rollout(), Seen(timer=True, ready=0, stable_ready=1)) == Move.BACK
    # All are gone, as when the machine restarts: going back would help nobody.
    assert move(rollout(), Seen(timer=True, ready=0, stable_ready=0)) is None


def test_nothing_goes_forward_to_a_version_that_is_ready_on_too_few() -> None:
    dark = Seen(timer=False, ready=0, stable_ready=0)
    assert move(rollout(step=1), dark) == Move.AWAIT_VERDICT
    assert move(rollout(step=1, waited=True), dark) == Move.BACK, "it did not come back in time"
    thin = Seen(timer=False, ready=1, stable_ready=2, needed=2)
    assert move(rollout(step=1), thin) == Move.AWAIT_VERDICT
    assert move(rollout(step=1, waited=True), Seen(True, 2, 2, 2)) == Move.FINISH


def test_reports_on_one_step_add_up() -> None:
    judged = guarded(figures={"error_rate": 0.01}, samples=200)
    opinion = pb.VerdictReport(verdict=pb.VERDICT_PASS, detail="looked at it")
    joined = rollouts.together(judged, opinion)
    assert (dict(joined.figures), joined.samples, joined.verdict) == (
        {"error_rate": 0.01},
        200,
        pb.VERDICT_PASS,
    )
    again = rollouts.together(judged, pb.VerdictReport(figures={"error_rate": 0.5}, samples=300))
    assert (again.figures["error_rate"], again.samples) == (0.5, 300)
    assert rollouts.together(judged, pb.VerdictReport(step=1)).samples == 0


@given(
    st.integers(1, 5),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
    st.floats(allow_nan=True),
    st.integers(0, 200),
    st.sampled_from([0, 1, 2]),
)
def test_nothing_advances_on_a_bad_or_missing_figure(
    steps: int, step: int, timer: bool, waited: bool, value: float, samples: int, verdict: int
) -> None:
    state = rollout(steps, step=min(step, steps - 1), waited=waited)
    state.plan.guards.add(metric="error_rate", max=0.02, min_samples=100)
    state.report.CopyFrom(
        pb.VerdictReport(step=state.step, figures={"error_rate": value}, samples=samples, verdict=verdict)  # type: ignore[arg-type]
    )
    found = move(state, Seen(timer, 1, 1))
    if found in (Move.ADVANCE, Move.FINISH):
        assert value <= 0.02
        assert samples >= 100
        assert verdict != pb.VERDICT_FAIL
        assert waited or not timer
    if value > 0.02 and samples >= 100:
        assert found == Move.BACK
