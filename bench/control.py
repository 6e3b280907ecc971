"""From a change in the registry to the first request that it routes: 1,000 replicas of 500 models, real etcd,
registry, control plane and Envoy, two backends in this process for the model that changes."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2

from bench.fleet import INFER, Fleet, fleet
from bench.processes import listener_on
from bench.report import Target, row
from deploy.local.layout import ENVOY_ADMIN, GATEWAY
from lingqu.gateway.v1 import gateway_pb2
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import instances_pb2, models_pb2

MODELS, REPLICAS = 500, 1000
PASSES = 150
PROBE = "probe"
HEALTH = "/grpc.health.v1.Health/Check"
AT_ONCE = 20
BOUND_MS = 150.0
# How often it is asked where requests go. Asking without a pause took a core of two from what is measured.
ASK_S = 0.002
SETTLED_S = 2.0


async def measure(offset: int) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    offsets = iter(range(offset, offset + 100, 10))
    with tempfile.TemporaryDirectory() as folder:
        async with fleet(Path(folder), lambda: next(offsets), ({},)) as made:
            return await _Probe(made).measured()


class _Backend(grpc.GenericRpcHandler):
    """Answers with its name."""

    def __init__(self, name: str) -> None:
        self._answer: bytes = service_pb2.ModelInferResponse(model_name=name).SerializeToString()

    async def start(self) -> None:
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == HEALTH:
            return grpc.unary_unary_rpc_method_handler(self._well)
        return grpc.unary_unary_rpc_method_handler(self._infer) if details.method == INFER else None

    async def _well(self, request: bytes, context: Any) -> bytes:
        well = health_pb2.HealthCheckResponse.SERVING
        answer: bytes = health_pb2.HealthCheckResponse(status=well).SerializeToString()
        return answer

    async def _infer(self, request: bytes, context: Any) -> bytes:
        return self._answer


class _Probe:
    """The model whose changes are measured, between all the others."""

    def __init__(self, made: Fleet) -> None:
        self._fleet = made
        gateway = made.gateways[0]
        self._metadata = (("authorization", f"Bearer {made.keys.mint('boss', admin=True).key}"),)
        self._channel = grpc.aio.insecure_channel(gateway.public)
        self._control = grpc.aio.insecure_channel(gateway.layout.address(GATEWAY))
        self._infer: Any = self._channel.unary_unary(INFER)
        self._body = service_pb2.ModelInferRequest(model_name=PROBE).SerializeToString()
        self._lease = 0
        self._processes = {
            name: listener_on(port)
            for name, port in (
                ("control plane", gateway.layout.port(GATEWAY)),
                ("Envoy", gateway.layout.port(ENVOY_ADMIN)),
            )
        }

    async def measured(self) -> list[Target]:
        backends = [_Backend("one"), _Backend("two")]
        for backend in backends:
            await backend.start()
        await self._fill()
        await self._register(backends[0].address)
        for _ in range(2):
            await self._version(PROBE)
        await self._register(backends[0].address, (1, 2))
        await self._share(1)
        await self._until("one")
        spent = self._spent()
        moved = await self._timed(
            (partial(self._register, b.address, (1, 2)), name) for b, name in _turns(backends)
        )
        moving = self._spent(spent)
        # Version 1 on one backend, version 2 on the other: only the shares change.
        await self._register(backends[0].address, (1,))
        await self._register(backends[1].address, (2,), "probe-2")
        await self._share(1)
        await self._until("one")
        spent = self._spent()
        released = await self._timed((partial(self._share, n), name) for n, name in _shares())
        releasing = self._spent(spent)
        rss = {name: process.memory_info().rss >> 20 for name, process in self._processes.items()}
        for backend in backends:
            await backend.server.stop(0)
        await self._channel.close()
        await self._control.close()
        print(
            f"\ncontrol: a change in the registry to the first request so routed,"
            f" {MODELS} models, {REPLICAS} replicas"
        )
        kinds = (("a replica moves", moved, moving), ("all traffic to another version", released, releasing))
        for name, found, spent in kinds:
            print(row(f"{name}, p50", [_percentile(found, 50)], "ms"))
            print(row(f"{name}, p99", [_percentile(found, 99)], "ms"))
            for process, seconds in spent.items():
                print(row(f"  processor time of {process}", [1000 * seconds / PASSES], "ms"))
        for process, size in rss.items():
            print(row(f"{process}, resident", [size], "MiB"))
        return [
            Target(
                f"registry change to routed traffic, {name}, p99",
                _percentile(found, 99),
                BOUND_MS,
                False,
                "ms",
            )
            for name, found in (("replica", moved), ("release", released))
        ]

    def _spent(self, before: dict[str, float] | None = None) -> dict[str, float]:
        """Seconds of processor time since `before`."""
        known = before or {}
        return {name: _cpu(process) - known.get(name, 0.0) for name, process in self._processes.items()}

    async def _fill(self) -> None:
        """All the others: at addresses of this machine where nobody listens."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with gate:
                await self._version(f"model-{number}")
                for replica in range(number, REPLICAS, MODELS):
                    address = f"127.1.{replica // 250}.{replica % 250 + 1}:9"
                    await self._host(f"filler-{replica}", address, f"model-{number}", (1,))
                await self._share(1, f"model-{number}")

        await asyncio.gather(*(one(number) for number in range(MODELS)))

    async def _version(self, model: str) -> None:
        artifact = models_pb2.Artifact(uri="file:///x", sha256="0" * 64)
        version = models_pb2.ModelVersion(model=model, artifact=artifact, task="tensor", runtime="python")
        request = models_pb2.CreateModelVersionRequest(version=version)
        await self._fleet._models.CreateModelVersion(request, timeout=20)

    async def _host(
        self, name: str, address: str, model: str, versions: tuple[int, ...], lease: int = 0
    ) -> int:
        ready = instances_pb2.HOSTED_STATE_READY
        held = [instances_pb2.HostedModel(model=model, version=v, state=ready) for v in versions]
        record = instances_pb2.Instance(id=name, service="inference", endpoints={"oip": address}, models=held)
        request = instances_pb2.RegisterInstanceRequest(
            instance=record, ttl=Duration(seconds=600), lease_id=lease
        )
        return int((await self._fleet._instances.RegisterInstance(request, timeout=20)).lease_id)

    async def _register(self, address: str, versions: tuple[int, ...] = (), name: str = "probe-1") -> None:
        if name == "probe-1":
            self._lease = await self._host(name, address, PROBE, versions, self._lease)
        else:
            await self._host(name, address, PROBE, versions)

    async def _share(self, version: int, model: str = PROBE) -> None:
        weights = [models_pb2.Weight(version=version, percent=100)]
        request = models_pb2.SetTrafficRequest(model=model, weights=weights)
        for _ in range(200):
            try:
                await self._fleet._models.SetTraffic(request, timeout=20)
                return
            except grpc.aio.AioRpcError as err:
                if err.code() != grpc.StatusCode.FAILED_PRECONDITION:  # its replicas are not known yet
                    raise
                await asyncio.sleep(0.02)
        raise TimeoutError(f"{model} never got its traffic")

    async def _until(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                answer = await self._infer(self._body, metadata=self._metadata, timeout=5)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.01)
                continue
            if service_pb2.ModelInferResponse.FromString(answer).model_name == name:
                return
            await asyncio.sleep(ASK_S)
        raise TimeoutError(f"no request has reached {name}")

    async def _timed(self, changes: Iterator[tuple[Callable[[], Awaitable[None]], str]]) -> list[float]:
        """Milliseconds from asking the registry for each change to the first request that it routes."""
        await self._settle()
        found = []
        for change, expected in changes:
            await asyncio.sleep(0.05)
            begun = time.perf_counter()
            await change()
            await self._until(expected)
            found.append(1000 * (time.perf_counter() - begun))
        state = await self._described()
        assert not state.refused, state.refused
        return found

    async def _described(self) -> Any:
        stub: Any = GatewayServiceStub(self._control)
        return await stub.DescribeRoutes(
            gateway_pb2.DescribeRoutesRequest(), metadata=self._metadata, timeout=20
        )

    async def _settle(self) -> None:
        """Until what came before has reached Envoy and nothing has changed for a while."""
        deadline, since, known = time.monotonic() + 60, time.monotonic(), ""
        while time.monotonic() < deadline:
            state = await self._described()
            synced = all(plane.synced_version == state.version for plane in state.data_planes)
            if state.version != known or not synced:
                known, since = state.version, time.monotonic()
            if time.monotonic() - since > SETTLED_S:
                return
            await asyncio.sleep(0.1)
        raise TimeoutError("the configuration never settles")


def _turns(backends: list[_Backend]) -> Iterator[tuple[_Backend, str]]:
    for number in range(PASSES):
        yield backends[(number + 1) % 2], ("two", "one")[number % 2]


def _shares() -> Iterator[tuple[int, str]]:
    for number in range(PASSES):
        yield (2, 1)[number % 2], ("two", "one")[number % 2]


def _percentile(found: list[float], percent: int) -> float:
    return sorted(found)[min(len(found) - 1, len(found) * percent // 100)]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
