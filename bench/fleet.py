"""Several gateways on one registry, each an Envoy with a control plane of its own, before a backend in this
process that notes what reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from tritonclient.grpc import service_pb2

from deploy.local import layout as at
from deploy.local import parts
from deploy.local.layout import Layout
from deploy.local.part import Part, Running, grpc_ready
from lingqu.registry.v1 import access_pb2, instances_pb2, ledger_pb2, models_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.ledger_pb2_grpc import LedgerServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub
from services.core.lifecycle import CHANNEL_OPTIONS
from services.gateway.headers import ADMITTED_HEADER
from services.gateway.keys import KeyRing

MODEL = "echo"
INFER = "/inference.GRPCInferenceService/ModelInfer"
# The call of whoever made a request, so that one that Envoy repeats is not taken for two.
NUMBER = "x-request-number"


@dataclass(frozen=True, slots=True)
class Arrival:
    """`admitted`: when the limiter has let it pass, 0 if it was not asked; times in seconds, that of the
    limiter by CLOCK_BOOTTIME to the millisecond."""

    client: str
    number: str
    at: float
    admitted: float


class Backend(grpc.GenericRpcHandler):
    """Answers every tensor request at once."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self._answer: bytes = service_pb2.ModelInferResponse(model_name=MODEL).SerializeToString()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._infer) if details.method == INFER else None

    async def _infer(self, request: bytes, context: Any) -> bytes:
        sent = dict(context.invocation_metadata())
        admitted = int(sent.get(ADMITTED_HEADER, 0)) / 1000
        self.arrivals.append(
            Arrival(sent["x-lingqu-client"], sent.get(NUMBER, ""), time.monotonic(), admitted)
        )
        return self._answer


class Process:
    """A part that may be killed and started again."""

    def __init__(self, part: Part, logs: Path) -> None:
        self._part = part
        self._logs = logs
        self._running: Running | None = None

    @property
    def pid(self) -> int:
        assert self._running is not None, f"{self._part.name} does not run"
        return self._running.pid

    async def start(self) -> None:
        self._running = await Running.start(self._part, self._logs)
        await self._running.until_ready()

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._running is not None:
            await self._running.ended()
        self._running = None

    def signal(self, number: int) -> None:
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self._running.pid, number)

    async def stop(self) -> None:
        if self._running is not None:
            self.signal(signal.SIGCONT)
            await self._running.stop()
        self._running = None


@dataclass(frozen=True, slots=True)
class Gateway:
    """One Envoy and its control plane."""

    layout: Layout
    control: Process
    envoy: Process

    @property
    def public(self) -> str:
        return self.layout.address(at.PUBLIC)

    @property
    def limiter(self) -> str:
        return self.layout.address(at.GATEWAY)

    async def start(self) -> None:
        await self.control.start()
        await self.envoy.start()

    async def stop(self) -> None:
        await self.envoy.stop()
        await self.control.stop()


class Fleet:
    def __init__(self, state: Path, layout: Layout, backend: Backend, keys: KeyRing, etcd: Process) -> None:
        self.state = state
        self.etcd = etcd
        self.layout = layout
        self.backend = backend
        self.keys = keys
        self.gateways: list[Gateway] = []
        self._channel = grpc.aio.insecure_channel(layout.address(at.REGISTRY), options=CHANNEL_OPTIONS)
        self.access: Any = AccessServiceStub(self._channel)
        self._instances: Any = RegistryServiceStub(self._channel)
        self._models: Any = ModelServiceStub(self._channel)
        self._ledger: Any = LedgerServiceStub(self._channel)

    async def close(self) -> None:
        await asyncio.gather(*(gateway.stop() for gateway in self.gateways))
        await self._channel.close()

    async def limit(self, client: str, **limits: int) -> None:
        """A client with these limits, whatever it had before."""
        record = access_pb2.Client(name=client, models=["*"], limits=access_pb2.Limits(**limits))  # type: ignore[arg-type]
        await self.access.SetClient(access_pb2.SetClientRequest(client=record), timeout=5)

    async def limit_model(self, **limits: int) -> None:
        record = access_pb2.SharedLimits(model=MODEL, limits=access_pb2.Limits(**limits))  # type: ignore[arg-type]
        await self.access.SetSharedLimits(access_pb2.SetSharedLimitsRequest(shared_limits=record), timeout=5)

    async def owner(self, shard: int) -> str:
        """Where the owner of a shard of limits answers; empty if there is none."""
        call = self._ledger.WatchShards(ledger_pb2.WatchShardsRequest(), timeout=5)
        try:
            snapshot = await call.read()
            return next((str(o.address) for o in snapshot.owners if o.shard == shard), "")
        finally:
            call.cancel()

    async def serve(self, backend: str) -> None:
        """The model with all its traffic to the backend."""
        version = models_pb2.ModelVersion(
            model=MODEL,
            artifact=models_pb2.Artifact(uri="file:///x", sha256="0" * 64),
            task="tensor",
            runtime="python",
        )
        await self._models.CreateModelVersion(
            models_pb2.CreateModelVersionRequest(version=version), timeout=5
        )
        held = instances_pb2.HostedModel(model=MODEL, version=1, state=instances_pb2.HOSTED_STATE_READY)
        instance = instances_pb2.Instance(
            id="backend", service="inference", endpoints={"oip": backend}, models=[held]
        )
        request = instances_pb2.RegisterInstanceRequest(instance=instance, ttl=Duration(seconds=600))
        await self._instances.RegisterInstance(request, timeout=5)
        promoted = models_pb2.PromoteModelVersionRequest(model=MODEL, version=1)
        await self._models.PromoteModelVersion(promoted, timeout=5)

    def gateway(self, offset: int, env: Mapping[str, str]) -> Gateway:
        number = len(self.gateways)
        layout = Layout(self.state / f"gateway-{number}", offset)
        settings = {
            "LINGQU_GATEWAY_LISTEN": layout.address(at.GATEWAY),
            "LINGQU_PUBLIC_LISTEN": layout.address(at.PUBLIC),
            "LINGQU_REGISTRY": self.layout.address(at.REGISTRY),
            "LINGQU_SIGNING_KEY": str(self.state / "signing.pem"),
            "LINGQU_GRACE_S": "0.2",
            "LINGQU_LIMITS_TELL": "true",
            **env,
        }
        control = Part(
            "control",
            (sys.executable, "-m", "services.gateway"),
            grpc_ready(layout.address(at.GATEWAY)),
            env=settings,
        )
        made = Gateway(layout, Process(control, layout.logs), Process(parts.envoy(layout), layout.logs))
        self.gateways.append(made)
        return made


class Caller:
    """A client of one gateway. Notes when it sent what was answered with OK."""

    def __init__(self, fleet: Fleet, gateway: Gateway, client: str) -> None:
        self.client = client
        self._channel = grpc.aio.insecure_channel(gateway.public, options=CHANNEL_OPTIONS)
        self._infer: Any = self._channel.unary_unary(INFER)
        self._metadata = (("authorization", f"Bearer {fleet.keys.mint(client).key}"),)
        self._body = service_pb2.ModelInferRequest(model_name=MODEL).SerializeToString()
        self._name = f"{client}-{id(self):x}"
        self.sent: dict[str, float] = {}
        self.refused: list[grpc.aio.AioRpcError] = []
        self.metadata: dict[str, Any] = {}

    async def ask(self, timeout_s: float = 5.0) -> grpc.StatusCode:
        number = f"{self._name}-{len(self.sent)}"
        self.sent[number] = time.monotonic()
        metadata = (*self._metadata, (NUMBER, number))
        call = self._infer(self._body, metadata=metadata, timeout=timeout_s)
        try:
            await call
        except grpc.aio.AioRpcError as err:
            self.refused.append(err)
            self.metadata = {}
            return err.code()
        self.metadata = dict(await call.initial_metadata())
        return grpc.StatusCode.OK

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def fleet(
    state: Path,
    offsets: Callable[[], int],
    gateways: Sequence[Mapping[str, str]],
    wired: Callable[[str], None] = lambda registry: None,
) -> AsyncIterator[Fleet]:
    """Ready to take requests for MODEL. `offsets` gives free ones, `gateways` the settings of each; `wired`
    is told where the registry answers."""
    layout = Layout(state, offsets())
    async with AsyncExitStack() as stack:
        registry = Part(
            "registry",
            (sys.executable, "-m", "services.registry"),
            grpc_ready(layout.address(at.REGISTRY)),
            env={
                "LINGQU_REGISTRY_LISTEN": layout.address(at.REGISTRY),
                "LINGQU_ETCD": layout.address(at.ETCD),
            },
        )
        etcd = Process(parts.etcd(layout), layout.logs)
        for process in (etcd, Process(registry, layout.logs)):
            stack.push_async_callback(process.stop)
            await process.start()
        backend = Backend()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((backend,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 0)
        wired(layout.address(at.REGISTRY))
        made = Fleet(state, layout, backend, KeyRing.at(state / "signing.pem"), etcd)
        stack.push_async_callback(made.close)
        await made.serve(f"127.0.0.1:{port}")
        started = [made.gateway(offsets(), env) for env in gateways]
        await asyncio.gather(*(gateway.start() for gateway in started))
        yield made
