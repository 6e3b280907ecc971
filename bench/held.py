"""Answers from the cache, and what it costs to hold many streams that wait."""

from __future__ import annotations

import asyncio
import base64
import statistics
from contextlib import suppress
from typing import Any

import grpc

from bench.peer import Peer
from bench.report import Target, row
from bench.suite import Suite
from lingqu.client import channel_options
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from pipeline.bundled import TEXT_MODEL

GENERATE = "/lingqu.inference.v1.InferenceService/Generate"
HITS_S, PASSES = 1.0, 5
STREAMS = 500


async def measure(suite: Suite) -> list[Target]:
    return [*await _cached(suite), *await _streams(suite)]


async def _cached(suite: Suite) -> list[Target]:
    request = pb.GenerateRequest(model=TEXT_MODEL, prompt="The canal joined two rivers and", max_tokens=64)
    asked = {
        "address": suite.public,
        "key": suite.key,
        "path": GENERATE,
        "requests": [base64.b64encode(request.SerializeToString()).decode()],
        "callers": 1,
        "seconds": HITS_S,
    }
    client = Peer("bench.call_client")
    try:
        found = [await client.measure(asked) for _ in range(PASSES + 1)][1:]
    finally:
        client.close()
    p50 = [statistics.median(one["ms"]) for one in found]
    print("\nthe same request again: 64 tokens from the cache, one call after the other")
    print(row("public port, p50", p50, "ms"))
    print(row("public port, p99", [sorted(one["ms"])[int(len(one["ms"]) * 0.99)] for one in found], "ms"))
    return [Target("an answer from the cache, p50", statistics.median(p50), 1.5, at_least=False, unit="ms")]


async def _streams(suite: Suite) -> list[Target]:
    process = suite.part("services.inference")
    await asyncio.sleep(1)
    before = process.memory_info().rss

    async def hold(stub: Any, number: int) -> None:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt=f"Stream {number} says", max_tokens=4000)
        with suppress(grpc.aio.AioRpcError):
            while True:  # a text may be complete before the time is over
                call = stub.StreamGenerate(request, metadata=(("authorization", f"Bearer {suite.key}"),))
                async for _ in call:
                    pass

    async with grpc.aio.insecure_channel(suite.public, options=channel_options(suite.public)) as channel:
        stub = InferenceServiceStub(channel)
        tasks = [asyncio.create_task(hold(stub, number)) for number in range(STREAMS)]
        await asyncio.sleep(8)
        held = sum(not task.done() for task in tasks)
        during = process.memory_info().rss
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    each = (during - before) / STREAMS / 1024
    print(f"\n{STREAMS} streams held by one inference process: 64 are computed, the others wait")
    print(f"  resident {before >> 20} MiB before, {during >> 20} MiB with them: {each:.0f} KiB a stream")
    return [Target("streams held of 500", held, STREAMS, unit="")]
