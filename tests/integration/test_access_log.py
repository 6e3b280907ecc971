"""A real Envoy tells the metrics service of every request that ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from services.metrics.points import Point
from tests import gateways, metrics
from tests.gateways import TENSOR, TEXT, Gateway
from tests.metrics import Service
from tests.waiting import until


@pytest.fixture(scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Gateway, Service]]:
    async with (
        metrics.running(tmp_path_factory.mktemp("metrics")) as service,
        gateways.running(
            tmp_path_factory.mktemp("gateway"), metrics=service.address, metrics_percent=100
        ) as gateway,
    ):
        yield gateway, service


def told(service: Service, **labels: str) -> list[Point]:
    found = [point for point in service.store.points if point.measurement == "requests"]
    return [point for point in found if labels.items() <= dict(point.labels).items()]


async def test_a_call_is_told_with_its_times(both: tuple[Gateway, Service]) -> None:
    gateway, service = both
    async with gateway.channel() as channel:
        stub: Any = InferenceServiceStub(channel)
        request = pb.GenerateRequest(model=TEXT, prompt="how long? " * 100)
        await stub.Generate(request, metadata=gateway.metadata, timeout=5)
    expected = {"client": "tester", "model": TEXT, "version": "1", "status": "OK", "api": "text"}
    found = await until(
        lambda: [p for p in told(service, **expected) if p.fields["request_bytes"] > 1000], "told"
    )
    fields = found[-1].fields
    assert 0 <= fields["received"] <= fields["first_byte"] <= fields["duration"] < 5
    assert fields["upstream"] <= fields["first_byte"]
    assert fields["response_bytes"] > 1000
    assert fields["value"] == 1


async def test_how_a_call_failed_is_told(both: tuple[Gateway, Service]) -> None:
    gateway, service = both
    async with gateway.channel() as channel:
        stub: Any = InferenceServiceStub(channel)
        for model, metadata in ((TEXT, ()), ("nope", gateway.metadata)):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(pb.GenerateRequest(model=model, prompt="x"), metadata=metadata, timeout=5)
        call = stub.StreamGenerate(
            pb.GenerateRequest(model=TEXT, prompt="one two"), metadata=gateway.metadata, timeout=5
        )
        await call.read()
        call.cancel()
    for status, client in (("UNAUTHENTICATED", None), ("NOT_FOUND", "tester"), ("CANCELLED", "tester")):
        labels = {"status": status} | ({"client": client} if client else {})
        found = await until(lambda labels=labels: told(service, **labels), f"{labels} is told")
        assert dict(found[0].labels).get("client") == client


async def test_every_one_of_many_calls_is_told(both: tuple[Gateway, Service]) -> None:
    gateway, service = both
    labels = {"client": "tester", "model": TENSOR, "api": "tensor", "status": "OK"}
    async with gateway.channel() as channel:
        stub: Any = oip_grpc.GRPCInferenceServiceStub(channel)
        request = oip.ModelInferRequest(model_name=TENSOR)
        await asyncio.gather(
            *(stub.ModelInfer(request, metadata=gateway.metadata, timeout=20) for _ in range(500))
        )
    found = await until(
        lambda: len(told(service, **labels)) >= 500 and told(service, **labels), "500 are told"
    )
    assert len(found) == 500
    assert len({point.time_ns for point in found}) == 500


def counted(service: Service) -> list[Point]:
    return [point for point in told(service, status="UNAUTHENTICATED") if "value" in point.fields]


async def test_one_told_of_stands_for_many_and_failures_for_themselves(tmp_path: Path) -> None:
    async with (
        metrics.running(tmp_path) as service,
        gateways.running(tmp_path, metrics=service.address, metrics_percent=10) as gateway,
    ):
        async with gateway.channel() as channel:
            stub: Any = oip_grpc.GRPCInferenceServiceStub(channel)

            async def infer(number: int, metadata: Any = gateway.metadata) -> None:
                request = oip.ModelInferRequest(model_name=TENSOR)
                calls = (stub.ModelInfer(request, metadata=metadata, timeout=20) for _ in range(number))
                await asyncio.gather(*calls, return_exceptions=True)

            for _ in range(10):
                await infer(100)
            await infer(70, metadata=())
            texts: Any = InferenceServiceStub(channel)
            for _ in range(5):
                await texts.Generate(
                    pb.GenerateRequest(model=TEXT, prompt="x"), metadata=gateway.metadata, timeout=5
                )
        found = await until(
            lambda: len(told(service, model=TENSOR)) > 40 and told(service, model=TENSOR), "told"
        )
        of_text = await until(
            lambda: len(told(service, model=TEXT)) >= 5 and told(service, model=TEXT), "all"
        )
        refused = await until(
            lambda: (found := counted(service)) and len(found) >= 70 and found, "each refusal is told"
        )
        drawn = [point for point in told(service, status="UNAUTHENTICATED") if "value" not in point.fields]
        assert {point.fields["value"] for point in of_text} == {1}
    assert len(found) < 180  # of 1,000, one in ten
    assert {point.fields["value"] for point in found} == {10}
    assert sum(point.fields["value"] for point in refused) == 70
    assert all(point.fields.keys() <= {"value", "failed_after"} for point in refused)
    # Those of them that were drawn have a part in times, as those that went well have.
    assert len(drawn) < 35
    assert all("duration" in point.fields for point in drawn)


async def test_without_a_metrics_service_requests_are_served(tmp_path: Path) -> None:
    async with metrics.running(tmp_path) as service:
        address = service.address
    async with gateways.running(tmp_path, metrics=address) as gateway:
        async with gateway.channel() as channel:
            stub: Any = InferenceServiceStub(channel)
            for _ in range(200):
                await stub.Generate(
                    pb.GenerateRequest(model=TEXT, prompt="x"), metadata=gateway.metadata, timeout=2
                )
        before = gateway.memory
        assert before < 512 << 20
        os.kill(gateway.pid, 0)
        # When it comes, it is told from then on.
        async with metrics.running(tmp_path, listen=address) as service:

            async def heard() -> bool:
                await gateway.serves()
                return bool(told(service, model=TEXT))

            await until(heard, "requests are told")
