"""Many streams at once through one Envoy: that all live, what each costs it in memory, and that ten minutes
of them do not make it grow. The backend is a fake in this process that says a word every few seconds."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.fleet import Fleet, fleet
from bench.processes import listener_on
from bench.report import Target
from deploy.local.layout import ENVOY_ADMIN
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from lingqu.registry.v1 import instances_pb2, models_pb2

MODEL = "talker"
STREAMS, CONNECTIONS = 2_000, 8
SECONDS = 600.0
SAMPLE_S = 5.0
WORD_S = 5.0
GROWTH = 1.05  # of the last third over the first


async def measure(offset: int, streams: int = STREAMS, seconds: float = SECONDS) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    offsets = iter(range(offset, offset + 100, 10))
    with tempfile.TemporaryDirectory() as folder:
        async with fleet(Path(folder), lambda: next(offsets), ({},)) as made:
            found = await held(made, streams, seconds)
    each = (found.during[0] - found.before) / streams / 1024
    third = max(1, len(found.during) // 3)
    growth = statistics.median(found.during[-third:]) / statistics.median(found.during[:third])
    print(f"\n{streams} streams held through one Envoy for {seconds:.0f} s, a word each {WORD_S:.0f} s")
    print(f"  alive at the end {found.alive}, words {found.words}, ended with an error {found.failed}")
    print(f"  Envoy resident {found.before >> 20} MiB before, {found.during[0] >> 20} MiB with them,")
    print(f"  {found.during[-1] >> 20} MiB at the end: {each:.0f} KiB a stream")
    return [
        Target("streams alive at the end", found.alive, streams, unit=""),
        Target("Envoy's memory, last third over first", growth, GROWTH, at_least=False),
    ]


@dataclass
class Held:
    """Memory in bytes. `words` were received, `failed` streams ended."""

    before: int
    during: list[int]
    alive: int
    words: int
    failed: int


class _Talker(InferenceServiceServicer):
    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        while True:
            yield pb.GenerateChunk(text="word ")
            await asyncio.sleep(WORD_S)


async def held(made: Fleet, streams: int, seconds: float) -> Held:
    """Hold that many streams for that long, all of them begun first."""
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(_Talker(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    registered = await _publish(made, f"127.0.0.1:{port}")
    gateway = made.gateways[0]
    metadata = (("authorization", f"Bearer {made.keys.mint('holder').key}"),)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(gateway.public, options=options) for _ in range(CONNECTIONS)]
    stubs: list[Any] = [InferenceServiceStub(channel) for channel in channels]
    envoy = listener_on(gateway.layout.port(ENVOY_ADMIN))
    words = failed = 0
    begun = asyncio.Semaphore(0)

    async def one(number: int) -> None:
        nonlocal words, failed
        request = pb.GenerateRequest(model=MODEL, prompt=f"{number}")
        call = stubs[number % CONNECTIONS].StreamGenerate(request, metadata=metadata)
        first = True
        try:
            async for _ in call:
                words += 1
                if first:
                    begun.release()
                    first = False
        except grpc.aio.AioRpcError:
            failed += 1
            begun.release()

    await _until_routed(stubs[0], metadata)
    before = envoy.memory_info().rss
    tasks = [asyncio.create_task(one(number)) for number in range(streams)]
    for _ in tasks:
        await begun.acquire()
    during = [envoy.memory_info().rss]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await asyncio.sleep(min(SAMPLE_S, seconds / 3))
        during.append(envoy.memory_info().rss)
        await made._instances.RegisterInstance(registered, timeout=10)
    alive = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for channel in channels:
        await channel.close()
    await server.stop(0)
    return Held(before, during, alive, words, failed)


async def _publish(made: Fleet, address: str) -> instances_pb2.RegisterInstanceRequest:
    """What is to be said again within ten minutes."""
    artifact = models_pb2.Artifact(uri="file:///x", sha256="0" * 64)
    version = models_pb2.ModelVersion(model=MODEL, artifact=artifact, task="generate", runtime="python")
    await made._models.CreateModelVersion(models_pb2.CreateModelVersionRequest(version=version), timeout=10)
    ready = instances_pb2.HOSTED_STATE_READY
    record = instances_pb2.Instance(
        id="talker",
        service="inference",
        endpoints={"grpc": address},
        models=[instances_pb2.HostedModel(model=MODEL, version=1, state=ready)],
    )
    request = instances_pb2.RegisterInstanceRequest(instance=record)
    request.ttl.FromSeconds(600)
    request.lease_id = (await made._instances.RegisterInstance(request, timeout=10)).lease_id
    promoted = models_pb2.PromoteModelVersionRequest(model=MODEL, version=1)
    await made._models.PromoteModelVersion(promoted, timeout=10)
    return request


async def _until_routed(stub: Any, metadata: Any) -> None:
    for _ in range(200):
        call = stub.StreamGenerate(pb.GenerateRequest(model=MODEL, prompt="x"), metadata=metadata)
        try:
            await call.read()
            return
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.1)
        finally:
            call.cancel()
    raise TimeoutError("the model is not routed")
