"""What a rollout does next: a pure rule over its plan, its last report and what is seen of its replicas."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from lingqu.registry.v1 import rollouts_pb2 as pb

RUNNING = pb.ROLLOUT_STATE_RUNNING
SUCCEEDED = pb.ROLLOUT_STATE_SUCCEEDED
ROLLED_BACK = pb.ROLLOUT_STATE_ROLLED_BACK
ENDED = pb.ROLLOUT_STATE_ENDED

VERDICT_TIMEOUT_S = 3600


class Move(enum.Enum):
    ADVANCE = "to the next step"
    FINISH = "all traffic to the version"
    BACK = "the traffic as it was before"
    AWAIT_VERDICT = "the wait is over, what is asked for is not there yet"


@dataclass(frozen=True, slots=True)
class Seen:
    """`timer`: the step's wait, or then its time for a verdict, is not over. How many replicas are ready, and
    how many have to be for the version to take more traffic."""

    timer: bool
    ready: int
    stable_ready: int
    needed: int = 1


def running(rollout: pb.Rollout) -> bool:
    return rollout.state == RUNNING


def decide(rollout: pb.Rollout, seen: Seen) -> tuple[Move, str] | None:
    """The next move and why; None: wait."""
    if reason := refused(rollout):
        return Move.BACK, reason
    if not seen.ready and seen.stable_ready:
        return Move.BACK, f"no live replica has version {rollout.version} ready any more"
    if seen.timer and not rollout.waited:
        return None
    lacking = missing(rollout)
    if seen.ready < max(1, seen.needed):
        lacking = lacking or f"the version to be ready on {max(1, seen.needed)} replicas ({seen.ready} are)"
    if not lacking:
        last = rollout.step + 1 >= len(rollout.plan.steps)
        why = f"step {rollout.step + 1} of {len(rollout.plan.steps)} held"
        return (Move.FINISH if last else Move.ADVANCE), why
    if not rollout.waited:
        return Move.AWAIT_VERDICT, f"waiting for {lacking}"
    if not seen.timer:
        return Move.BACK, f"waited in vain for {lacking}"
    return None


def refused(rollout: pb.Rollout) -> str:
    """Why the report on the step in progress is bad; empty if it is not, or there is none."""
    report = rollout.report
    if report.step != rollout.step or not rollout.HasField("report"):
        return ""
    if report.verdict == pb.VERDICT_FAIL:
        return f"the verdict was FAIL: {report.detail or 'no reason given'}"
    for guard in rollout.plan.guards:
        value = report.figures.get(guard.metric)
        if value is None or report.samples < guard.min_samples:
            continue
        if math.isnan(value):
            return f"{guard.metric} is not a number"
        if guard.HasField("min") and value < guard.min:
            return f"{guard.metric} is {value:g}, at least {guard.min:g} is asked for"
        if guard.HasField("max") and value > guard.max:
            return f"{guard.metric} is {value:g}, at most {guard.max:g} is asked for"
    return ""


def together(rollout: pb.Rollout, report: pb.VerdictReport) -> pb.VerdictReport:
    """A report completed by what earlier ones said of the same step: figures it does not have, an opinion."""
    earlier = rollout.report if rollout.HasField("report") else pb.VerdictReport()
    if earlier.step != report.step:
        return report
    joined = pb.VerdictReport()
    joined.CopyFrom(report)
    joined.figures.update({**earlier.figures, **report.figures})
    joined.samples = report.samples if report.figures else earlier.samples
    joined.verdict = report.verdict or earlier.verdict
    return joined


def missing(rollout: pb.Rollout) -> str:
    """What the step still lacks besides its wait; empty if nothing."""
    report = rollout.report if rollout.HasField("report") and rollout.report.step == rollout.step else None
    for guard in rollout.plan.guards:
        if report is None or guard.metric not in report.figures:
            return f"the figure {guard.metric}"
        if report.samples < guard.min_samples:
            return f"{guard.min_samples} samples (there are {report.samples}) of {guard.metric}"
    if rollout.plan.require_pass and (report is None or report.verdict != pb.VERDICT_PASS):
        return "a verdict of PASS"
    return ""


def wait_s(rollout: pb.Rollout) -> int:
    """Of the step in progress."""
    return int(rollout.plan.steps[rollout.step].wait.seconds)


def verdict_timeout_s(rollout: pb.Rollout) -> int:
    return int(rollout.plan.verdict_timeout.seconds) or VERDICT_TIMEOUT_S
