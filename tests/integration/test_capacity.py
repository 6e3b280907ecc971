"""Capacity and KEDA's scaler as their callers meet them, on points in a real store."""

from __future__ import annotations

import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration

from lingqu.metrics.keda import externalscaler_pb2 as keda
from lingqu.metrics.keda.externalscaler_pb2_grpc import ExternalScalerStub
from lingqu.metrics.v1 import capacity_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from services.core.errors import BackendUnavailable
from services.metrics.points import Point, labels
from services.metrics.stores.duck import DuckStore
from tests.metrics import Memory, running

SECOND_NS = 1_000_000_000
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
CURVE = {1: 70.0, 2: 130.0, 4: 240.0, 8: 400.0, 16: 540.0, 32: 625.0}


def model(
    name: str = "m",
    *,
    requests: int = 500,
    age_s: float = 1.0,
    waiting: float = 0.0,
    waited_s: float = 0.0,
    instances: tuple[str, ...] = ("a",),
) -> list[Point]:
    """What a text model with answers of 64 tokens has told, the last time `age_s` ago."""
    points = []
    for instance in instances:
        now = time.time_ns() - int(age_s * SECOND_NS)

        def tell(what: str, value: float, *, at: int = now, instance: str = instance, **more: str) -> None:
            found = {"model": name, "version": "1", "instance": instance, **more}
            points.append(Point(f"lingqu.inference.{what}", labels(found), {"value": value}, at))

        tell("slots", 64)
        tell("running", 0)
        tell("queue.length", waiting, priority="normal")
        tell("tokens.in_flight", 640)
        for n in range(20 if requests else 0):  # the last 200 s
            share, at = requests / 20 / len(instances), now - n * 10 * SECOND_NS
            tell("queue.admitted", share, at=at, priority="normal")
            tell("queue.seconds", share * waited_s, at=at, priority="normal")
            tell("tokens.generated", share * 64, at=at)
            tell("work.squared", share * 64 * 64 * 1.1, at=at)
            for level, rate in CURVE.items():
                seconds = share * 64 / sum(CURVE.values())
                tell("level.seconds", seconds, at=at, level=str(level))
                tell("level.slots", seconds * level, at=at, level=str(level))
                tell("level.work", seconds * rate, at=at, level=str(level))
    return points


class Suite:
    def __init__(self, store: DuckStore, channel: grpc.aio.Channel) -> None:
        self.store = store
        self.metrics: Any = MetricsServiceStub(channel)
        self.scaler: Any = ExternalScalerStub(channel)

    async def capacity(self, name: str = "m", rps: float | None = None, **objectives: float) -> Any:
        request = pb.GetCapacityRequest(model=name)
        if rps is not None:
            request.rps = rps
        for percentile, seconds in objectives.items():
            latency = Duration(nanos=round(seconds % 1 * 1e9), seconds=int(seconds))
            request.objectives.add(percentile=float(percentile[1:]), latency=latency)
        return await self.metrics.GetCapacity(request, timeout=10)

    async def value(self, **metadata: str) -> float:
        ref = keda.ScaledObjectRef(name="m", namespace="x", scalerMetadata={"model": "m", **metadata})
        (spec,) = (await self.scaler.GetMetricSpec(ref, timeout=10)).metricSpecs
        question = keda.GetMetricsRequest(scaledObjectRef=ref, metricName=spec.metricName)
        (found,) = (await self.scaler.GetMetrics(question, timeout=10)).metricValues
        assert found.metricValue == math.ceil(found.metricValueFloat)
        return float(found.metricValueFloat)

    async def active(self, **metadata: str) -> bool:
        given = {"model": "m", "metric": "queue_length", "target": "4", **metadata}
        answer = await self.scaler.IsActive(keda.ScaledObjectRef(scalerMetadata=given), timeout=10)
        return bool(answer.result)


@asynccontextmanager
async def served(folder: Path, store: Any) -> AsyncIterator[Suite]:
    async with (
        running(folder, store=store) as service,
        grpc.aio.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield Suite(store, channel)


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Suite]:
    store = DuckStore(tmp_path / "m.duckdb")
    async with served(tmp_path, store) as made:
        yield made
    store.close()


def refused(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), error.value.details() or ""


async def test_a_model_is_advised_on_what_it_did(suite: Suite) -> None:
    suite.store.write(model())
    now = await suite.capacity()
    assert (now.version, now.replicas, now.requests) == (1, 1, 500)
    assert now.tokens == pytest.approx(64, rel=0.01)
    assert now.variation == pytest.approx(0.1, abs=0.01)
    assert now.measured_rps == pytest.approx(500 / 200, rel=0.15)
    assert now.max_rps == pytest.approx(CURVE[32] / 64, rel=0.01)
    assert {round(point.concurrency): round(point.rate) for point in now.curve} == CURVE
    assert now.limit == pb.CAPACITY_LIMIT_NONE
    more = await suite.capacity(rps=50, p95=3.0)
    assert more.utilization > 1
    assert not more.HasField("latency")
    assert more.limit == pb.CAPACITY_LIMIT_THROUGHPUT
    assert more.replicas_needed > 50 / now.max_rps
    never = await suite.capacity(rps=1, p95=0.5)
    assert (never.limit, never.replicas_needed) == (pb.CAPACITY_LIMIT_SERVICE_TIME, 0)


async def test_what_is_not_known_is_said_and_not_made_up(suite: Suite) -> None:
    suite.store.write(model("idle", requests=0) + model("young", requests=12))
    for name, code, said in (
        ("nobody", grpc.StatusCode.NOT_FOUND, "measured are idle, young"),
        ("idle", grpc.StatusCode.FAILED_PRECONDITION, "0 of 100"),
        ("young", grpc.StatusCode.FAILED_PRECONDITION, "12 of 100"),
        ("", grpc.StatusCode.INVALID_ARGUMENT, "model: is required"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await suite.capacity(name)
        found = refused(error)
        assert found[0] == code
        assert said in found[1]
    for rps, objectives, said in (
        (math.nan, {}, "rps"),
        (-1.0, {}, "rps"),
        (1.0, {"p90": 1.0}, "objectives[0].percentile"),
        (1.0, {"p95": 0.0}, "objectives[0].latency"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await suite.capacity("idle", rps, **objectives)
        assert refused(error)[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert said in refused(error)[1]


async def test_clocks_that_are_off_are_noticed(suite: Suite) -> None:
    suite.store.write(model("ahead", age_s=-120.0) + model("behind", age_s=240.0))
    ahead, behind = await suite.capacity("ahead"), await suite.capacity("behind")
    assert any(re.search("clock .* ahead by 1(19|20) s", note) for note in ahead.notes)
    assert ahead.requests == 500
    assert behind.age.seconds == pytest.approx(240, abs=2)
    assert any("no replica tells of itself" in note for note in behind.notes)


async def test_a_tensor_model_is_advised_by_tritons_counters(suite: Suite) -> None:
    fields = {"requests": 100.0, "executions": 50.0, "inferences": 100.0, "compute_seconds": 2.0}
    at = time.time_ns()
    found = labels({"triton": "t", "model": "echo", "version": "3"})
    suite.store.write([Point("triton", found, fields, at - n * 10 * SECOND_NS) for n in range(10)])
    answer = await suite.capacity("echo")
    assert (answer.version, answer.requests) == (3, 1000)
    assert answer.max_rps == pytest.approx(100)  # 2 s of 100 requests, of which two share each execution
    assert any("Triton" in note for note in answer.notes)


async def test_keda_scales_on_what_there_is(suite: Suite) -> None:
    suite.store.write(model(instances=("a", "b"), waiting=3.0, waited_s=0.25))
    assert await suite.value(metric="tokens_in_flight", target="2000") == 1280
    assert await suite.value(metric="queue_length", target="4") == 6
    waits = await suite.value(metric="queue_time", target="500ms", window="2m")
    assert 2 * 0.25 <= waits < 2 * 4.0  # times the replicas, and those who wait count
    assert await suite.value(metric="utilization", target="0.7", window="200s") == pytest.approx(
        2.5 / (CURVE[32] / 64), rel=0.1
    )
    assert await suite.value(metric="predicted", p95="5s", window="200s") == 1
    assert await suite.active()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await suite.value(metric="predicted", p95="100ms")
    assert refused(error)[0] == grpc.StatusCode.FAILED_PRECONDITION


async def test_keda_is_told_that_figures_are_stale_and_not_zero(suite: Suite) -> None:
    suite.store.write(model(age_s=45.0))
    for metadata in (
        {"metric": "tokens_in_flight", "target": "1"},
        {"metric": "queue_time", "target": "1s"},
        {"metric": "predicted", "p95": "5s"},
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await suite.value(**metadata)
        assert refused(error)[0] == grpc.StatusCode.UNAVAILABLE, metadata


async def test_a_model_of_no_replicas_wakes_when_somebody_asks(suite: Suite) -> None:
    ref = keda.ScaledObjectRef(scalerMetadata={"model": "m", "metric": "queue_length", "target": "4"})
    states = aiter(suite.scaler.StreamIsActive(ref, timeout=20))
    assert not (await anext(states)).result
    asked = labels({"model": "m", "version": "1", "status": "UNAVAILABLE", "api": "text", "client": "c"})
    suite.store.write([Point("requests", asked, {"value": 1.0}, time.time_ns())])
    assert await suite.active()
    assert not await suite.active(activation="1")
    assert (await anext(states)).result


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"model": ""}, "model"),
        ({"metric": "cpu"}, "metric"),
        ({"target": "0"}, "target"),
        ({"target": "nan"}, "target"),
        ({"metric": "utilization", "target": "70"}, "target"),
        ({"metric": "queue_time", "target": "5"}, "target"),
        ({"metric": "predicted"}, "p95"),
        ({"window": "1s"}, "window"),
        ({"activation": "-1"}, "activation"),
        ({"version": "newest"}, "version"),
        ({"treshold": "5"}, "treshold"),
    ],
)
async def test_metadata_that_are_wrong_are_named(
    suite: Suite, metadata: Mapping[str, str], field: str
) -> None:
    given = {"metric": "tokens_in_flight", "target": "5", **metadata}
    if given["metric"] == "predicted":
        del given["target"]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await suite.value(**given)
    assert refused(error)[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert f"scalerMetadata.{field}" in refused(error)[1]


async def test_a_store_that_is_away_is_no_zero(tmp_path: Path) -> None:
    store = Memory()
    store.away.set()
    async with served(tmp_path, store) as suite:
        for call in (suite.capacity(), suite.value(metric="queue_length", target="4"), suite.active()):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert refused(error)[0] == BackendUnavailable.code


async def test_the_scaled_object_of_the_docs_is_understood(suite: Suite) -> None:
    text = OPERATIONS.read_text()
    (found,) = (
        body
        for block in text.split("```yaml\n")[1:]
        if (body := yaml.safe_load(block.split("```")[0]))["kind"] == "ScaledObject"
    )
    assert found["spec"]["fallback"]["failureThreshold"] > 0
    for given in found["spec"]["triggers"]:
        assert given["type"] in ("external", "external-push")
        ref = keda.ScaledObjectRef(name="m", scalerMetadata=given["metadata"])
        (spec,) = (await suite.scaler.GetMetricSpec(ref, timeout=10)).metricSpecs
        assert spec.targetSizeFloat > 0
