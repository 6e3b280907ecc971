"""A registry whose wall clock jumps a day forward and back while it runs: whatever lasts is measured by etcd
or by clocks that do not jump, and history keeps its order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import instances_pb2, models_pb2, rollouts_pb2
from tests.conftest import EtcdServer, missing
from tests.histories import invariants, truth
from tests.registries import Api, RegistryProcess, once_allowed, refused
from tests.waiting import pause, until

pytestmark = pytest.mark.chaos

DAY_S = 86_400
FORWARD, BACK = "+1d", "-1d"
INTERVAL_S = 3


@dataclass(frozen=True, slots=True)
class Jumping:
    """A registry under libfaketime: its wall clock follows a file, its monotonic clock is the real one."""

    api: Api
    clock: Path

    async def jump(self, offset: str) -> None:
        """Set the clock, and see by a new version that it was."""
        self.clock.write_text(f"{offset}\n")
        request = models_pb2.CreateModelVersionRequest(version=models_pb2.ModelVersion(model="clock"))
        request.version.MergeFrom(
            models_pb2.ModelVersion(
                artifact=models_pb2.Artifact(uri="file:///x", sha256="0" * 64),
                task="tensor",
                runtime="python",
            )
        )
        created = (await self.api.models.CreateModelVersion(request, timeout=5)).version
        ahead_s = created.create_time.seconds - time.time()
        assert abs(ahead_s - {FORWARD: DAY_S, BACK: -DAY_S}[offset]) < 60, "the registry's clock was not set"


def libfaketime() -> Path:
    folders = ("lib", "lib64", "lib/*-linux-gnu", "local/lib")
    found = [at for folder in folders for at in Path("/usr").glob(f"{folder}/faketime/libfaketimeMT.so.1")]
    return found[0] if found else missing("libfaketime (Debian's package faketime)")


@pytest.fixture
async def jumping(etcd_server: EtcdServer, tmp_path: Path) -> AsyncIterator[Jumping]:
    library, clock = libfaketime(), tmp_path / "clock"
    clock.write_text("+0\n")
    fake = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",  # before 0.9.9
        "LINGQU_GRACE_S": "0.1",
    }
    registry = await RegistryProcess.start(etcd_server, "registry", env=fake)
    yield Jumping(registry.api, clock)
    await registry.stop()


class KeptAlive:
    """An instance with a lease of two seconds, renewed twice a second."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.renewed = 0
        self.shortest_s = 2.0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        request = instances_pb2.RegisterInstanceRequest(
            instance=instances_pb2.Instance(id="k", service="test")
        )
        request.ttl.FromSeconds(2)
        registered = await self._api.instances.RegisterInstance(request, timeout=5)
        call: Any = self._api.instances.KeepAlive()
        while True:
            await call.write(instances_pb2.KeepAliveRequest(lease_id=registered.lease_id))
            answer = await call.read()
            self.shortest_s = min(self.shortest_s, answer.ttl.ToTimedelta().total_seconds())
            self.renewed += 1
            await pause(0.5, "twice a second")

    async def more(self) -> None:
        """Wait for renewals enough to outlast the lease."""
        goal = self.renewed + 6
        await until(lambda: self.renewed >= goal or self._task.done(), "the lease is renewed")
        assert not self._task.done(), self._task
        listed = await self._api.instances.ListInstances(instances_pb2.ListInstancesRequest(), timeout=5)
        assert "k" in [instance.id for instance in listed.instances]

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def test_a_clock_that_jumps_moves_neither_leases_nor_waits_nor_history(
    etcd_server: EtcdServer, jumping: Jumping
) -> None:
    api = jumping.api
    await api.create()
    await api.create()
    await api.host(1, 2)
    await api.promote(1)
    policy = models_pb2.Policy()
    policy.min_release_interval.FromSeconds(INTERVAL_S)
    await api.models.SetPolicy(models_pb2.SetPolicyRequest(model="m", policy=policy), timeout=5)
    kept = KeptAlive(api)
    await api.promote(2)

    for offset, number in ((FORWARD, 1), (BACK, 2)):
        await jumping.jump(offset)
        error = await refused(api.promote(number))
        assert error.reason == "TOO_SOON"
        assert error.retry_after_s is not None
        assert 1 <= error.retry_after_s <= INTERVAL_S
        await kept.more()
        await once_allowed(partial(api.promote, number))

    await jumping.jump(FORWARD)
    await rolled_out(jumping, 1)
    await kept.more()
    await kept.stop()
    assert kept.shortest_s >= 1
    assert list(invariants.problems(await truth.read(etcd_server.address))) == [], "times rise with numbers"


async def rolled_out(jumping: Jumping, number: int) -> None:
    """A rollout with a step of three seconds, during which the clock jumps back and forward."""
    api = jumping.api
    step = rollouts_pb2.RolloutStep(percent=10, wait=Duration(seconds=3))
    request = rollouts_pb2.StartRolloutRequest(
        model="m", version=number, plan=rollouts_pb2.RolloutPlan(steps=[step])
    )
    await api.models.SetPolicy(models_pb2.SetPolicyRequest(model="m"), timeout=5)
    await api.rollouts.StartRollout(request, timeout=5)
    begun = time.monotonic()
    for offset in (BACK, FORWARD):
        await jumping.jump(offset)
        await pause(0.5, "time enough for a wait that a jump had ended")
        if time.monotonic() - begun < 2:  # a slow machine may have come to the end of the wait
            assert (await api.rollout()).state == rollouts_pb2.ROLLOUT_STATE_RUNNING

    async def succeeded() -> bool:
        return (await api.rollout()).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED

    await until(succeeded, "the rollout has ended")
    assert time.monotonic() - begun > 2.5, "not before its wait was over"
