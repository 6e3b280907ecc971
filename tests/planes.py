"""A real Envoy that gets its configuration from the real discovery service, and backends that do as told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.load_stats.v3 import lrs_pb2_grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from deploy.local.layout import ENVOY_ADMIN, GATEWAY, PUBLIC, Layout
from deploy.local.parts import envoy
from lingqu.inference.v1 import inference_pb2 as pb
from services.core.access import Access
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.core.tasks import background
from services.gateway.ads import Ads, Snapshots
from services.gateway.bootstrap import bootstrap
from services.gateway.figures import Figures
from services.gateway.judge import Judge
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.snapshot import Snapshot, snapshot
from services.gateway.view import AFFINITY, View, view
from tests.conftest import free_offset
from tests.waiting import until

GENERATE = "/lingqu.inference.v1.InferenceService/Generate"
STREAM = "/lingqu.inference.v1.InferenceService/StreamGenerate"


@dataclass
class Backend(grpc.GenericRpcHandler):
    """Answers every method with one GenerateResponse; `before` may delay or fail it. `asked` are the
    calls that came, `busy` those in progress, `most` the most at once."""

    before: Callable[[grpc.aio.ServicerContext[Any, Any]], Awaitable[None]] | None = None
    asked: int = 0
    busy: int = 0
    most: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    address: str = ""
    server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def unary(_: bytes, context: Any) -> bytes:
            with self._noted(context):
                if self.before is not None:
                    await self.before(context)
                return pb.GenerateResponse(text=self.address).SerializeToString()

        async def stream(_: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            yield await unary(b"", context)

        # A unary answer goes out as a whole, so that it has either come or not begun.
        if "Stream" in details.method:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    @contextmanager
    def _noted(self, context: Any) -> Iterator[None]:
        self.asked += 1
        self.busy += 1
        self.most = max(self.most, self.busy)
        self.headers = {key: str(value) for key, value in context.invocation_metadata()}
        try:
            yield
        finally:
            self.busy -= 1


@asynccontextmanager
async def raw_server(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Any:
    """The address of a TCP server that speaks whatever `serve` does."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@dataclass(frozen=True)
class Answer:
    """`details` by the name of their type."""

    code: grpc.StatusCode
    text: str
    headers: dict[str, str]
    details: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.code is grpc.StatusCode.OK


class Caller:
    """A client with a key of its own and a connection of its own."""

    def __init__(self, address: str, key: str) -> None:
        self.key = key
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)])

    def call(self, model: str, timeout_s: float = 10.0, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        method = self.channel.unary_unary(
            GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        request = pb.GenerateRequest(model=model, prompt="x")
        authorization = ("authorization", f"Bearer {self.key}")
        return method(request, metadata=(authorization, *metadata), timeout=timeout_s)

    async def ask(self, model: str, timeout_s: float = 10.0) -> Answer:
        call = self.call(model, timeout_s)
        try:
            text = (await call).text
        except grpc.aio.AioRpcError as err:
            found = rpc_status.from_call(err)  # type: ignore[arg-type]
            headers = {**dict(err.initial_metadata() or ()), **dict(err.trailing_metadata() or ())}
            return Answer(err.code(), err.details() or "", headers, _details(found))
        return Answer(grpc.StatusCode.OK, text, dict(await call.initial_metadata()), {})

    async def ask_often(self, model: str, times: int, at_once: bool = True) -> list[Answer]:
        if at_once:
            return await asyncio.gather(*(self.ask(model) for _ in range(times)))
        return [await self.ask(model) for _ in range(times)]


def _details(status: status_pb2.Status | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for packed in status.details if status else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            message = kind()
            if packed.Unpack(message):
                found[kind.DESCRIPTOR.name] = message
    return found


@dataclass
class Plane:
    """One Envoy and the control plane it follows."""

    entry: Entry
    keys: KeyRing
    ads: Ads
    snapshots: Snapshots
    admin: str
    stack: AsyncExitStack
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    shown: View = field(default_factory=lambda: View((), ()))
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self) -> None:
        self.judge = Judge(self.changed, self.figures.answered)

    async def show(
        self, replicas: Sequence[Replica], models: Sequence[Model], access: Access | None = None
    ) -> None:
        """Until Envoy has accepted it."""
        self.shown = view(replicas, models, access)
        made = await self._publish()
        await until(
            lambda: any(plane.synced == made.version for plane in self.ads.planes.values()),
            f"Envoy has the configuration: {[p.last_rejection for p in self.ads.planes.values()]}",
            every_s=0.01,
        )

    async def follow(self) -> None:
        """What breakers decide, for ever."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            await self._publish()

    async def _publish(self) -> Snapshot:
        made = snapshot(self.judge.applied(self.shown), self.entry)
        await self.snapshots.publish(made)
        return made

    async def caller(self, name: str) -> Caller:
        made = Caller(self.entry.listen, self.keys.mint(name).key)
        self.stack.push_async_callback(made.channel.close)
        return made


def hosting(name: str, address: str, *versions: VersionKey, http: str = "127.0.0.1:1") -> Replica:
    """A replica that has the versions ready."""
    endpoints = {"grpc": address, "oip": address, "http": http}
    return Replica(name, "inference", endpoints, tuple(Hosted(key, READY) for key in versions))


def model(name: str, *shares: int, **settings: Any) -> Model:
    """A model whose versions 1, 2, … have these shares, each request wherever there is room."""
    versions = tuple(
        Version(VersionKey(name, number), "file:///x", "0", "generate", "x", labels={AFFINITY: "none"})
        for number in range(1, len(shares) + 1)
    )
    return Model(name, versions, tuple(enumerate(shares, 1)), **settings)


@asynccontextmanager
async def plane(folder: Path, figures: Figures | None = None, **settings: Any) -> AsyncIterator[Plane]:
    """Nothing is routed before `show`. `settings` are further fields of Entry."""
    layout = Layout(folder, free_offset())
    keys = KeyRing.at(folder / "key.pem")
    entry = Entry(layout.address(PUBLIC), layout.address(GATEWAY), keys.jwks(), **settings)
    snapshots = Snapshots()
    ads = Ads(snapshots)
    async with AsyncExitStack() as stack:
        server = grpc.aio.server()
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
        admin = layout.address(ENVOY_ADMIN)
        made = Plane(entry, keys, ads, snapshots, admin, stack, figures=figures or Figures())
        lrs_pb2_grpc.add_LoadReportingServiceServicer_to_server(made.judge.loads, server)
        server.add_insecure_port(entry.control)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        config = folder / "envoy.json"
        config.write_text(json.dumps(bootstrap("test", entry.control, admin)))
        process = await asyncio.create_subprocess_exec(
            envoy(layout).argv[0], "-c", str(config), "--disable-hot-restart", "--concurrency", "1",
            "--log-level", "warn",
        )  # fmt: skip
        stack.push_async_callback(_end, process)
        await until(lambda: ads.planes, "Envoy asks for its configuration")
        await stack.enter_async_context(background(made.judge.run(), made.follow()))
        yield made
        assert process.returncode is None, "Envoy did not live to the end"


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()
