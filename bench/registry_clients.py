"""Client processes of bench/registry.py: `watch` and `keepalive`, told what to do by arguments, answering on
standard output as JSON. All clocks are CLOCK_MONOTONIC, which is one for the whole machine."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from bench.watch_client import watches
from lingqu.registry.v1 import instances_pb2 as pb
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from services.core.lifecycle import CHANNEL_OPTIONS

STREAMS_PER_CHANNEL = 50


def channels(address: str, streams: int) -> list[grpc.aio.Channel]:
    count = -(-streams // STREAMS_PER_CHANNEL)
    return [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(count)]


async def watch(address: str, streams: int) -> None:
    """Says "ready" once all have their snapshot; at the end of standard input, when each revision came."""
    path = "/lingqu.registry.v1.RegistryService/WatchInstances"
    opened = await watches(address, path, streams, -(-streams // STREAMS_PER_CHANNEL))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    times: defaultdict[int, list[float]] = defaultdict(list)
    for connection in opened:
        for at, raw in connection.received:
            times[pb.WatchInstancesResponse.FromString(raw).revision].append(at)
    print(json.dumps(times))


async def keepalive(address: str, streams: int, name: str) -> None:
    """Registers `streams` instances, says "ready", and renews each on a stream of its own, one request after
    the other, from a line on standard input to its end; then tells how many there were."""
    opened = channels(address, streams)
    at_once = asyncio.Semaphore(16)

    async def register(number: int) -> int:
        request = pb.RegisterInstanceRequest(
            instance=pb.Instance(id=f"{name}-{number}", service="bench"), ttl=Duration(seconds=600)
        )
        async with at_once:
            stub = RegistryServiceStub(opened[number % len(opened)])
            return (await stub.RegisterInstance(request, timeout=30)).lease_id

    leases = await asyncio.gather(*(register(number) for number in range(streams)))
    calls: list[Any] = [RegistryServiceStub(opened[n % len(opened)]).KeepAlive() for n in range(streams)]
    delays: list[float] = []

    async def one(call: Any, lease: int) -> None:
        request = pb.KeepAliveRequest(lease_id=lease)
        while True:
            begun = time.monotonic()
            await call.write(request)
            await call.read()
            delays.append(time.monotonic() - begun)

    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    tasks = [asyncio.create_task(one(call, lease)) for call, lease in zip(calls, leases, strict=True)]
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(delays))
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    kind, address, streams, *rest = sys.argv[1:]
    kinds: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"watch": watch, "keepalive": keepalive}
    asyncio.run(kinds[kind](address, int(streams), *rest))
