"""How far a version is: the state machine, as pure rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from lingqu.registry.v1 import instances_pb2, models_pb2
from services.core.errors import WrongStage

Stage: TypeAlias = models_pb2.Stage.ValueType
REGISTERED = models_pb2.STAGE_REGISTERED
VALIDATING = models_pb2.STAGE_VALIDATING
READY = models_pb2.STAGE_READY
SERVING = models_pb2.STAGE_SERVING
RETIRED = models_pb2.STAGE_RETIRED
REJECTED = models_pb2.STAGE_REJECTED

ALLOWED: dict[Stage, frozenset[Stage]] = {
    REGISTERED: frozenset({VALIDATING, SERVING, RETIRED}),
    VALIDATING: frozenset({READY, SERVING, REJECTED, RETIRED}),
    READY: frozenset({SERVING, RETIRED}),
    SERVING: frozenset({READY}),
    RETIRED: frozenset({REGISTERED}),
    REJECTED: frozenset({REGISTERED, RETIRED}),
}
"""To SERVING straight from REGISTERED or VALIDATING: replicas were seen ready before the stage said so."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the live replicas say of a version. `refusals`: "instance: reason" of those that gave up.
    `silent`: how many could hold it by its model's placement and have not said anything yet."""

    loading: int
    ready: int
    refusals: tuple[str, ...]
    silent: int = 0

    @classmethod
    def of(
        cls, hosted: Iterable[tuple[str, instances_pb2.HostedModel]], fitting: Iterable[str] = ()
    ) -> Holdings:
        """From (instance, what it says) pairs, and the instances that could hold it. A replica that tries
        again by itself counts as loading."""
        hosted = list(hosted)
        loading = ready = 0
        refusals = []
        for instance, held in hosted:
            if held.state == instances_pb2.HOSTED_STATE_READY:
                ready += 1
            elif held.state == instances_pb2.HOSTED_STATE_FAILED and not held.will_retry:
                refusals.append(f"{instance}: {held.detail}")
            else:
                loading += 1
        silent = len(set(fitting) - {instance for instance, _ in hosted})
        return cls(loading, ready, tuple(refusals), silent)


def following(stage: Stage, holdings: Holdings, needed: int) -> tuple[Stage, str] | None:
    """The next stage by what the replicas say, with its reason; None: it stays."""
    held = holdings.loading or holdings.ready or holdings.refusals
    if stage == REGISTERED and held:
        return VALIDATING, "replicas are loading it"
    if stage == VALIDATING and holdings.ready >= max(1, needed):
        return READY, f"proven on {holdings.ready} replica{'s' if holdings.ready > 1 else ''}"
    undecided = holdings.loading or holdings.ready or holdings.silent
    if stage == VALIDATING and holdings.refusals and not undecided:
        return REJECTED, "; ".join(holdings.refusals)[:1024]
    return None


def check(version: models_pb2.ModelVersion, to: Stage) -> None:
    """Raises WrongStage if the state machine does not lead from the version's stage to `to`."""
    if to not in ALLOWED[version.stage]:
        raise WrongStage(
            f'version {version.version} of "{version.model}" is {name(version.stage)}'
            f"{f' ({version.stage_detail})' if version.stage_detail else ''}: "
            f"it cannot become {name(to)}"
        )


def record(to: Stage, why: str) -> models_pb2.ModelVersion:
    """What is stored of a stage."""
    stored = models_pb2.ModelVersion(stage=to, stage_detail=why[:1024])
    stored.stage_time.GetCurrentTime()
    return stored


def name(stage: Stage) -> str:
    """For people: "ready"."""
    return models_pb2.Stage.Name(stage).removeprefix("STAGE_").lower()
