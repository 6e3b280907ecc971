"""Automatic canaries on a real etcd: forward, back, held, driven by whichever replica leads."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import models_pb2, rollouts_pb2
from lingqu.registry.v1.rollouts_pb2 import (
    ROLLOUT_STATE_ENDED,
    ROLLOUT_STATE_ROLLED_BACK,
    ROLLOUT_STATE_RUNNING,
    ROLLOUT_STATE_SUCCEEDED,
    VERDICT_FAIL,
    VERDICT_PASS,
)
from services.registry.leader import TTL_S
from tests.conftest import EtcdServer
from tests.registries import LOADING, Api, RegistryProcess, refused, served, weights
from tests.waiting import pause, until


@pytest.fixture
async def api(etcd_server: EtcdServer) -> AsyncIterator[Api]:
    async with served(etcd_server) as found:
        yield found


async def ready(api: Api) -> None:
    await api.create()
    await api.create()
    await api.host(1, 2)
    await api.promote(1)


def plan(*percents: int, wait_s: int = 0, **fields: Any) -> rollouts_pb2.RolloutPlan:
    steps = [rollouts_pb2.RolloutStep(percent=p, wait=Duration(seconds=wait_s)) for p in percents]
    return rollouts_pb2.RolloutPlan(steps=steps, **fields)


async def start(api: Api, plan: rollouts_pb2.RolloutPlan, **fields: Any) -> rollouts_pb2.Rollout:
    request = rollouts_pb2.StartRolloutRequest(model="m", version=2, plan=plan, **fields)
    return (await api.rollouts.StartRollout(request, timeout=5)).rollout  # type: ignore[no-any-return]


async def report(api: Api, rollout: rollouts_pb2.Rollout, **fields: Any) -> rollouts_pb2.Rollout:
    request = rollouts_pb2.ReportVerdictRequest(
        model="m", rollout=rollout.id, **{"step": rollout.step, **fields}
    )
    return (await api.rollouts.ReportVerdict(request, timeout=5)).rollout  # type: ignore[no-any-return]


async def until_state(api: Api, state: int, step: int | None = None) -> rollouts_pb2.Rollout:
    async def reached() -> rollouts_pb2.Rollout | None:
        found = await api.rollout()
        return found if found.state == state and step in (None, found.step) else None

    found = await until(reached, f"{rollouts_pb2.RolloutState.Name(state)} at step {step}")  # type: ignore[arg-type]
    assert found
    return found


async def test_a_leader_whose_etcd_hangs_gives_up_and_leads_again(etcd_server: EtcdServer, api: Api) -> None:
    await api.create()
    await api.host(1)
    await api.until_stage(1, models_pb2.STAGE_READY)  # so it leads
    os.kill(etcd_server.pid, signal.SIGSTOP)
    await pause(TTL_S + 1.5, "longer than a leader waits for its lease to be renewed")
    os.kill(etcd_server.pid, signal.SIGCONT)
    number = await created(api)
    await api.host(1, number)
    await api.until_stage(number, models_pb2.STAGE_READY)


async def created(api: Api) -> int:
    """A new version, once etcd is back."""

    async def answered() -> int:
        try:
            return await api.create()
        except grpc.aio.AioRpcError as err:
            assert err.code() == grpc.StatusCode.UNAVAILABLE, err  # noqa: PT017
            return 0

    return await until(answered, "a version is created")


async def test_a_rollout_by_time_alone_ends_with_all_traffic(api: Api) -> None:
    await ready(api)
    started = await start(api, plan(10, 50, wait_s=2), reason="new weights")
    model = await api.model()
    assert weights(model) == {1: 90, 2: 10}
    assert dict(model.traffic.aliases) == {"stable": 1, "canary": 2}
    assert (started.state, started.from_version) == (ROLLOUT_STATE_RUNNING, 1)
    await until_state(api, ROLLOUT_STATE_RUNNING, step=1)
    assert weights(await api.model()) == {1: 50, 2: 50}
    await until_state(api, ROLLOUT_STATE_SUCCEEDED)
    model = await api.model()
    assert weights(model) == {2: 100}
    assert dict(model.traffic.aliases) == {"stable": 2}
    answer = await api.models.ListReleases(models_pb2.ListReleasesRequest(model="m"), timeout=5)
    assert [weights_of(r.after) for r in answer.releases] == [
        {2: 100},
        {1: 50, 2: 50},
        {1: 90, 2: 10},
        {1: 100},
    ]
    # One rollback undoes the whole rollout, not its last step.
    assert weights(await api.rollback()) == {1: 100}


def weights_of(traffic: models_pb2.Traffic) -> dict[int, int]:
    return {w.version: w.percent for w in traffic.weights}


async def test_copies_are_no_way_around_the_thresholds_of_a_policy(api: Api) -> None:
    """A first step of copies only gives the version no share, the next one does."""
    await api.create()
    await api.create(evaluation={"accuracy": 0.5})
    await api.host(1, 2)
    await api.promote(1)
    threshold = models_pb2.Threshold(metric="accuracy", min=0.9)
    request = models_pb2.SetPolicyRequest(model="m", policy=models_pb2.Policy(thresholds=[threshold]))
    await api.models.SetPolicy(request, timeout=5)
    for first in (plan(10, wait_s=60), plan(0, 10, wait_s=60, shadow_percent=100)):
        error = await refused(start(api, first))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BELOW_THRESHOLD")
    assert weights(await api.model()) == {1: 100}


async def test_verdicts_advance_and_a_bad_one_goes_back_at_once(api: Api) -> None:
    await ready(api)
    guards = [rollouts_pb2.Guard(metric="error_rate", max=0.02, min_samples=100)]
    rollout = await start(api, plan(10, 50, guards=guards, require_pass=True))

    async def waited() -> bool:
        return (await api.rollout()).waited

    await until(waited, "the step waits for a verdict")
    await report(api, rollout, verdict=VERDICT_PASS, figures={"error_rate": 0.01}, samples=99)
    assert (await api.rollout()).step == 0, "too few samples"
    await report(api, rollout, verdict=VERDICT_PASS, figures={"error_rate": 0.01}, samples=100)
    rollout = await until_state(api, ROLLOUT_STATE_RUNNING, step=1)
    error = await refused(report(api, rollout, step=0, verdict=VERDICT_FAIL))
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    await report(api, rollout, figures={"error_rate": 0.03}, samples=100)
    ended = await until_state(api, ROLLOUT_STATE_ROLLED_BACK)
    assert "error_rate is 0.03" in ended.detail
    assert weights(await api.model()) == {1: 100}
    assert "canary" not in (await api.model()).traffic.aliases
    assert (
        await refused(report(api, rollout, verdict=VERDICT_PASS))
    ).code == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_failed_step_stays_failed(api: Api) -> None:
    """A verdict of PASS that follows at once does not save it."""
    await ready(api)
    rollout = await start(api, plan(10, 50, wait_s=60, require_pass=True))
    await report(api, rollout, verdict=VERDICT_FAIL, detail="labels differ")
    error = await refused(report(api, rollout, verdict=VERDICT_PASS))
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "labels differ" in (await until_state(api, ROLLOUT_STATE_ROLLED_BACK)).detail


async def test_nothing_goes_forward_while_no_replica_is_ready(api: Api) -> None:
    """Both versions reload, as when the only Triton restarts; the rollout waits for them."""
    await ready(api)
    await start(api, plan(10, wait_s=2))
    await api.host(1, 2, state=LOADING)

    async def waits() -> bool:
        return (await api.rollout()).waited

    await until(waits, "the wait is over")
    assert weights(await api.model()) == {1: 90, 2: 10}
    await api.host(1, 2)
    await until_state(api, ROLLOUT_STATE_SUCCEEDED)


async def test_without_a_verdict_in_time_it_goes_back(api: Api) -> None:
    await ready(api)
    await start(api, plan(10, require_pass=True, verdict_timeout=Duration(seconds=2)))
    assert "in vain for a verdict" in (await until_state(api, ROLLOUT_STATE_ROLLED_BACK)).detail
    assert weights(await api.model()) == {1: 100}


async def test_a_version_that_dies_alone_goes_back(api: Api) -> None:
    await ready(api)
    await start(api, plan(10, wait_s=60))
    await api.host(1)
    assert "no live replica" in (await until_state(api, ROLLOUT_STATE_ROLLED_BACK)).detail
    assert weights(await api.model()) == {1: 100}


async def test_while_it_runs_only_a_rollback_or_an_abort_moves_traffic(api: Api) -> None:
    await ready(api)
    await start(api, plan(10, wait_s=60))
    for call in (api.promote(2), api.split({1: 50, 2: 50}), start(api, plan(20))):
        error = await refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ROLLOUT_RUNNING")
    assert weights(await api.rollback()) == {1: 100}
    assert (await api.rollout()).state == ROLLOUT_STATE_ENDED
    await start(api, plan(10, wait_s=60))
    abort = rollouts_pb2.AbortRolloutRequest(model="m", reason="lunch")
    ended = (await api.rollouts.AbortRollout(abort, timeout=5)).rollout
    assert ended.state == ROLLOUT_STATE_ROLLED_BACK
    assert "lunch" in ended.detail
    assert weights(await api.model()) == {1: 100}
    await api.promote(2)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (plan(), "plan.steps"),
        (plan(50, 50), "plan.steps[1].percent"),
        (plan(100), "plan.steps[0].percent"),
        (
            rollouts_pb2.RolloutPlan(steps=[rollouts_pb2.RolloutStep(percent=5, wait=Duration(nanos=1))]),
            "plan.steps[0].wait",
        ),
        (plan(5, guards=[rollouts_pb2.Guard(metric="e")]), "plan.guards[0].min"),
        (plan(5, guards=[rollouts_pb2.Guard(metric="", max=1)]), "plan.guards[0].metric"),
        (plan(5, guards=[rollouts_pb2.Guard(metric="e", min=2, max=1)]), "plan.guards[0].min"),
    ],
)
async def test_a_wrong_plan_is_refused_by_field(
    api: Api, wrong: rollouts_pb2.RolloutPlan, field: str
) -> None:
    error = await refused(start(api, wrong))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_rollout_needs_a_ready_version_and_one_that_serves(api: Api) -> None:
    await api.create()
    await api.create()
    await api.host(1)
    assert (await refused(start(api, plan(10)))).code == grpc.StatusCode.FAILED_PRECONDITION
    await api.promote(1)
    assert (await refused(start(api, plan(10)))).reason == "NOT_READY"


async def test_another_replica_drives_it_on_when_the_leader_is_killed(
    etcd_server: EtcdServer,
) -> None:
    """Two registry processes; the first one leads and is killed in the middle of a rollout."""
    first = await RegistryProcess.start(etcd_server, "first")
    second = await RegistryProcess.start(etcd_server, "second")
    await ready(first.api)
    started = await start(first.api, plan(10, 50, wait_s=2))
    await first.kill()
    done = await until_state(second.api, ROLLOUT_STATE_SUCCEEDED)
    assert done.id == started.id
    assert weights(await second.api.model()) == {2: 100}
    await second.stop()


async def test_a_deposed_leader_changes_nothing(etcd_server: EtcdServer) -> None:
    """The leader is stopped (not killed) until another has taken over, and wakes up in the middle."""
    first = await RegistryProcess.start(etcd_server, "first")
    second = await RegistryProcess.start(etcd_server, "second")
    api = second.api
    await ready(api)
    await start(api, plan(10, 20, 30, 40, wait_s=2))
    os.kill(first.pid, signal.SIGSTOP)
    try:
        await until_state(api, ROLLOUT_STATE_RUNNING, step=2)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    await until_state(api, ROLLOUT_STATE_SUCCEEDED)
    await pause(0.5, "what a woken leader might still write")
    answer = await api.models.ListReleases(models_pb2.ListReleasesRequest(model="m"), timeout=5)
    shares = [weights_of(r.after).get(2, 0) for r in reversed(answer.releases)]
    assert shares == [0, 10, 20, 30, 40, 100], "each step once, in order"
    await first.stop()
    await second.stop()
