"""Real requests for a model that has no replicas wake it: through a real Envoy to what KEDA is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from lingqu.metrics.keda import externalscaler_pb2 as keda
from lingqu.metrics.keda.externalscaler_pb2_grpc import ExternalScalerStub
from services.metrics.stores.duck import DuckStore
from tests import gateways, metrics
from tests.gateways import AWAY, TEXT, Gateway
from tests.waiting import until


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[tuple[Gateway, Any]]:
    """A gateway with the settings of a suite, and the scaler that hears of its requests."""
    store = DuckStore(tmp_path / "metrics.duckdb")
    async with (
        metrics.running(tmp_path, store=store) as service,
        gateways.running(tmp_path, metrics=service.address) as gateway,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        yield gateway, ExternalScalerStub(channel)
    store.close()


async def by_text(gateway: Gateway) -> None:
    async with gateway.channel() as channel:
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(
                pb.GenerateRequest(model=AWAY, prompt="x"), metadata=gateway.metadata, timeout=5
            )
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def by_tensors(gateway: Gateway) -> None:
    """Few of them are told, but for those that fail."""
    async with gateway.channel() as channel:
        stub: Any = oip_grpc.GRPCInferenceServiceStub(channel)
        request = oip.ModelInferRequest(model_name=AWAY)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(request, metadata=gateway.metadata, timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def by_rest(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False) as client:
        client.headers["authorization"] = f"Bearer {gateway.key}"
        answer = await client.post("/v1/chat/completions", json={"model": AWAY, "messages": []})
    assert answer.status_code == 503


def ref(model: str) -> keda.ScaledObjectRef:
    metadata = {"model": model, "metric": "queue_length", "target": "4"}
    return keda.ScaledObjectRef(scalerMetadata=metadata)


@pytest.mark.parametrize("ask", [by_text, by_tensors, by_rest])
async def test_one_request_in_vain_wakes_a_model(both: tuple[Gateway, Any], ask: Any) -> None:
    gateway, scaler = both

    async def active(model: str) -> bool:
        return bool((await scaler.IsActive(ref(model), timeout=10)).result)

    assert await gateway.serves()
    await until(lambda: active(TEXT), "requests of a model with a replica are heard")
    assert not await active(AWAY)
    await ask(gateway)
    await until(lambda: active(AWAY), "the model is woken")


async def test_who_follows_hears_of_it(both: tuple[Gateway, Any]) -> None:
    gateway, scaler = both
    states = aiter(scaler.StreamIsActive(ref(AWAY), timeout=20))
    assert not (await anext(states)).result
    await by_text(gateway)
    assert (await anext(states)).result
