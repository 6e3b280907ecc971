"""Replicas that do not answer, that are in other zones, and that are being drained, through a real Envoy."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx2 as httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.discovery import Model, Replica
from services.gateway import health
from services.gateway.admin import conditions
from tests.dataplane import DataPlane, FakeReplica, dataplane, model, replicas
from tests.waiting import pause, until

M = ("m", 1)
MODELS = [model("m", {1: 100}, labels={"lingqu.affinity": "none"})]
QUICK = {"interval": "0.2s", "no_traffic_interval": "0.2s", "timeout": "0.2s", "interval_jitter": "0.01s"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks, ten times as often."""
    monkeypatch.setattr(health, "_CHECK", {**health._CHECK, **QUICK})
    monkeypatch.setattr(health, "REPORT_S", 0.2)


@pytest.fixture
async def hosts() -> AsyncIterator[list[FakeReplica]]:
    async with replicas("a", "b", "c") as found:
        yield found


class Following:
    """Publishes the state again whenever the health that is reported changes, as the control plane does."""

    def __init__(self, plane: DataPlane, found: list[Replica], models: list[Model]) -> None:
        self._plane = plane
        self._state = found, models

    async def __aenter__(self) -> None:
        await self._plane.publish(*self._state)
        self._task = asyncio.create_task(self._follow())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _follow(self) -> None:
        while True:
            await self._plane.health.changed.wait()
            self._plane.health.changed.clear()
            await self._plane.publish(*self._state)


async def who(plane: DataPlane, number: int = 24) -> set[str]:
    found = Counter([(await plane.generate("m")).text for _ in range(number)])
    found.update([(await plane.infer("m")).id for _ in range(number)])
    return set(found)


async def until_only(plane: DataPlane, names: str) -> None:
    async def answered() -> bool:
        return await who(plane) == set(names)

    await until(answered, f"{names} answer", timeout_s=8)


@pytest.mark.parametrize("state", ["not serving", "hung"])
async def test_who_does_not_answer_gets_nothing_until_it_does(
    tmp_path: Path, hosts: list[FakeReplica], state: str
) -> None:
    async with dataplane(tmp_path) as plane, Following(plane, [h.hosting(M) for h in hosts], MODELS):
        await until_only(plane, "abc")
        assert plane.health.unhealthy == set()
        hosts[0].healthy(state)
        await until_only(plane, "bc")
        assert plane.health.unhealthy == {hosts[0].endpoints["grpc"], hosts[0].endpoints["oip"]}
        hosts[0].healthy()
        await until_only(plane, "abc")


async def test_when_nobody_answers_the_question_everybody_is_tried(
    tmp_path: Path, hosts: list[FakeReplica]
) -> None:
    """The checks may be wrong; a replica that is drained is left out all the same."""
    found = [h.hosting(M) for h in hosts]
    found[2] = replace(found[2], draining=True)
    async with dataplane(tmp_path) as plane, Following(plane, found, MODELS):
        for host in hosts:
            host.healthy("not serving")
        await until(lambda: len(plane.health.unhealthy) == 4, "two replicas are out")
        await until_only(plane, "ab")


async def test_a_replica_that_comes_is_used_before_it_is_asked(
    tmp_path: Path, hosts: list[FakeReplica]
) -> None:
    async with dataplane(tmp_path) as plane:
        await plane.publish([hosts[0].hosting(M)], MODELS)
        await until(lambda: plane.health.reports, "a report")
        await plane.publish([h.hosting(M) for h in hosts], MODELS)
        assert len(await who(plane)) > 1
        for _ in range(10):
            await pause(0.05, "reports of half a second")
            assert plane.health.unhealthy == set()


async def test_replicas_of_the_own_zone_come_first(tmp_path: Path, hosts: list[FakeReplica]) -> None:
    found = [hosts[0].hosting(M, zone="x"), hosts[1].hosting(M, zone="x"), hosts[2].hosting(M, zone="y")]
    async with dataplane(tmp_path, zone="x") as plane, Following(plane, found, MODELS):
        await until_only(plane, "ab")
        hosts[0].healthy("not serving")
        await until_only(plane, "bc")  # what one of two cannot take goes to the others
        hosts[1].healthy("not serving")
        await until_only(plane, "c")


async def test_a_drained_replica_ends_what_it_has_and_gets_nothing_new(
    tmp_path: Path, hosts: list[FakeReplica]
) -> None:
    found = [h.hosting(M) for h in hosts[:2]]
    async with dataplane(tmp_path) as plane:
        await plane.publish(found[:1], MODELS)
        request = pb.GenerateRequest(model="m", prompt="x")
        call = plane.text.StreamGenerate(request, metadata=plane.metadata, timeout=20)
        heard = aiter(call)
        assert (await anext(heard)).text.startswith("a ")
        await plane.publish([replace(found[0], draining=True), found[1]], MODELS)
        assert await who(plane) == {"b"}
        assert [(await anext(heard)).text[:2] for _ in range(10)] == ["a "] * 10
        hosts[0].release.set()
        assert [chunk.text async for chunk in heard][-1] == "end"
        await plane.publish(found, MODELS)
        await until_only(plane, "ab")


async def test_envoy_tells_what_it_thinks_of_its_endpoints(tmp_path: Path, hosts: list[FakeReplica]) -> None:
    found = [h.hosting(M) for h in hosts]
    async with dataplane(tmp_path) as plane:
        at = [h.endpoints["grpc"] for h in hosts]
        await plane.publish(found, MODELS, unhealthy=at[:1])
        told = await conditions("test", plane.admin)
        assert told is not None
        assert [told["text/m/1"][address].healthy for address in at] == [False, True, True]
        assert await conditions("another", plane.admin) is None
        assert await conditions("test", "127.0.0.1:1") is None


async def test_a_drained_gateway_fails_its_health_check_and_cuts_nothing(
    tmp_path: Path, hosts: list[FakeReplica]
) -> None:
    async with dataplane(tmp_path) as plane, httpx.AsyncClient(trust_env=False) as admin:
        await plane.publish([hosts[0].hosting(M)], MODELS)
        request = pb.GenerateRequest(model="m", prompt="x")
        call = plane.text.StreamGenerate(request, metadata=plane.metadata, timeout=20)
        heard = aiter(call)
        await anext(heard)

        async def code() -> grpc.StatusCode:
            """Of the public port's health; UNIMPLEMENTED where the question reaches this control plane."""
            async with grpc.aio.insecure_channel(plane.address) as channel:
                check = HealthStub(channel).Check(HealthCheckRequest(), timeout=5)  # type: ignore[misc]
                try:
                    await check
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK

        assert await code() == grpc.StatusCode.UNIMPLEMENTED
        await admin.post(f"http://{plane.admin}/healthcheck/fail")
        assert await code() == grpc.StatusCode.UNAVAILABLE
        assert (await plane.generate("m")).text == "a"  # whoever still comes is served
        assert [(await anext(heard)).text[:2] for _ in range(10)] == ["a "] * 10
        await admin.post(f"http://{plane.admin}/healthcheck/ok")
        assert await code() == grpc.StatusCode.UNIMPLEMENTED
        hosts[0].release.set()
        assert [chunk.text async for chunk in heard][-1] == "end"
