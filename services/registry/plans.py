"""Which plans of rollouts the registry accepts."""

from __future__ import annotations

from lingqu.registry.v1 import rollouts_pb2
from services.core.errors import InvalidInput
from services.registry.validation import MAX_FIGURES, MAX_WAIT_S, bounds, seconds

MAX_STEPS = 20


def plan(value: rollouts_pb2.RolloutPlan) -> rollouts_pb2.RolloutPlan:
    if not 1 <= len(value.steps) <= MAX_STEPS:
        raise InvalidInput("plan.steps", f"1 to {MAX_STEPS} steps are needed")
    if value.shadow_percent > 100:
        raise InvalidInput("plan.shadow_percent", "at most 100")
    before = -1 if value.shadow_percent else 0
    for index, step in enumerate(value.steps):
        if not before < step.percent < 100:
            also = "" if step.percent or index else "; 0 goes with a shadow_percent only"
            raise InvalidInput(
                f"plan.steps[{index}].percent", f"1 to 99 and more than the step before is needed{also}"
            )
        before = step.percent
        seconds(f"plan.steps[{index}].wait", step.wait, MAX_WAIT_S)
    if len(value.guards) > MAX_FIGURES:
        raise InvalidInput("plan.guards", f"at most {MAX_FIGURES}")
    for index, guard in enumerate(value.guards):
        bounds(f"plan.guards[{index}]", guard)
    seconds("plan.verdict_timeout", value.verdict_timeout, MAX_WAIT_S)
    _judgement(value.judgement)
    return value


def _judgement(value: rollouts_pb2.Judgement) -> None:
    ranges = {
        "false_alarms": (1e-6, 0.5),
        "error_increase": (0, 1),
        "label_disagreement": (0, 1),
        "cosine_distance": (0, 1),
        "token_divergence": (0, 1),
        "least": (1, 1_000_000),
    }
    for name, (low, high) in ranges.items():
        if value.HasField(name) and not low <= getattr(value, name) <= high:  # type: ignore[arg-type]
            raise InvalidInput(f"plan.judgement.{name}", f"{low:g} to {high:,g} is needed")
    if value.HasField("slowdown") and value.slowdown and not 1 <= value.slowdown <= 1000:
        raise InvalidInput("plan.judgement.slowdown", "1 to 1,000 is needed, or 0: not asked")
