"""Limits of tokens in a whole suite: what inference has counted stops the next request, in gRPC and REST."""

from __future__ import annotations

import grpc
import httpx2 as httpx
import pytest

import lingqu
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.registry.v1 import access_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub
from pipeline.bundled import TEXT_MODEL
from services.gateway.keys import KeyRing
from tests.waiting import until

LIMIT = 30


@pytest.fixture
def key(suite: Suite) -> str:
    return KeyRing.at(suite.layout.state / "gateway" / "signing.pem").mint("thrifty").key


async def test_used_up_tokens_refuse_text_and_rest(suite: Suite, key: str) -> None:
    limits = access_pb2.Limits(tokens_per_minute=LIMIT)
    record = access_pb2.Client(name="thrifty", models=["*"], limits=limits)
    async with grpc.aio.insecure_channel(suite.layout.address(at.REGISTRY)) as registry:
        await AccessServiceStub(registry).SetClient(
            access_pb2.SetClientRequest(client=record),
            timeout=5,
            metadata=(("authorization", f"Bearer {suite.key}"),),
        )
    refused: list[lingqu.LingquError] = []
    used = 0
    async with lingqu.Client(suite.public, key, timeout=20) as client:

        async def exhausted() -> bool:
            nonlocal used
            try:
                answer = await client.generate(TEXT_MODEL, "The canal joined", max_tokens=8, no_cache=True)
            except lingqu.LingquError as error:
                refused.append(error)
                return True
            used += answer.usage.prompt_tokens + answer.usage.completion_tokens
            return False

        await until(exhausted, "the limit is reached")
    assert used >= LIMIT
    assert refused[0].reason == "LIMIT_REACHED"
    body = {"model": TEXT_MODEL, "prompt": "x", "max_tokens": 1}
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.post(
            f"http://{suite.public}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
        )
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert "30 tokens per minute" in answer.json()["error"]["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-limit"].startswith("30")
