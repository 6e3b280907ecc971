"""The state machine of versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingqu.registry.v1 import instances_pb2, models_pb2
from services.core.errors import WrongStage
from services.registry import stages
from services.registry.stages import Holdings, following

EVERY = sorted(stages.ALLOWED)


@given(
    st.sampled_from(EVERY),
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.just("i: why"), max_size=3),
    st.integers(0, 3),
)
def test_what_replicas_say_moves_only_where_the_machine_allows(
    stage: stages.Stage, loading: int, ready: int, refusals: list[str], needed: int
) -> None:
    seen = 0
    holdings = Holdings(loading, ready, tuple(refusals))
    while (step := following(stage, holdings, needed)) is not None:
        assert step[0] in stages.ALLOWED[stage]
        stage, seen = step[0], seen + 1
        assert seen < 3
    if stage == stages.READY and seen:
        assert ready >= max(1, needed)
    if stage == stages.REJECTED and seen:
        assert refusals
        assert not ready


def test_one_replica_that_tries_again_keeps_a_version_from_being_rejected() -> None:
    failed = instances_pb2.HOSTED_STATE_FAILED
    final = ("a", instances_pb2.HostedModel(state=failed, detail="golden example differs"))
    again = ("b", instances_pb2.HostedModel(state=failed, detail="bucket away", will_retry=True))
    assert following(stages.VALIDATING, Holdings.of([final, again]), 1) is None
    assert following(stages.VALIDATING, Holdings.of([final], ["a", "b"]), 1) is None, "b has not tried"
    assert following(stages.VALIDATING, Holdings.of([final], ["a"]), 1) == (
        stages.REJECTED,
        "a: golden example differs",
    )


def test_a_forbidden_transition_names_both_stages() -> None:
    version = models_pb2.ModelVersion(
        model="m", version=3, stage=stages.REJECTED, stage_detail="i: golden example differs"
    )
    with pytest.raises(WrongStage, match=r"version 3 of .m. is rejected .*differs.*cannot become serving"):
        stages.check(version, stages.SERVING)
