"""TLS at a real Envoy with a real ADS server: towards clients, between the parts, and certificates that are
renewed while streams go on."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import psutil
import pytest
from cryptography import x509
from envoy.service.discovery.v3 import ads_pb2_grpc
from pydantic import ValidationError

from deploy.local.layout import ENVOY_ADMIN, PUBLIC, Layout
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from services.core import renewal, tls
from services.core.authority import Authority
from services.core.tls import Identity
from services.gateway.ads import Ads, Snapshots
from services.gateway.app import GatewaySettings
from services.gateway.bootstrap import bootstrap
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.secrets import LOOK_S, SecretFiles, WatchedSecrets, secret_files
from services.gateway.snapshot import snapshot
from services.inference.rest.server import serving_http
from tests import gateways, metrics
from tests.conftest import free_offset
from tests.gateways import TEXT, Backend
from tests.metrics import Service
from tests.waiting import until

HOSTS = ("127.0.0.1", "localhost")


@dataclass
class Suite:
    """An Envoy, its control plane and a backend, with certificates of `parts`; clients' are of `clients`."""

    folder: Path
    address: str
    upstream: str
    parts: Authority
    clients: Authority
    files: SecretFiles
    backend: Backend
    entry: Entry
    snapshots: Snapshots
    key: str
    metrics: Service

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.key}"),)

    async def publish(self) -> None:
        self.entry = replace(self.entry, secrets=self.files.read())
        await self.snapshots.publish(snapshot(gateways.seen(self.upstream), self.entry))

    @asynccontextmanager
    async def stub(self, own: tuple[Path, Path] | None = None) -> AsyncIterator[Any]:
        certificate, key = (path.read_bytes() for path in own) if own else (None, None)
        credentials = grpc.ssl_channel_credentials(self.parts.certificate.read_bytes(), key, certificate)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            yield InferenceServiceStub(channel)

    async def serial(self) -> int:
        """Of the certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=str(self.parts.certificate))
        host, port = self.address.split(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        found: Any = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(found).serial_number

    async def serves(self) -> bool:
        async with self.stub() as stub:
            try:
                await stub.Generate(
                    pb.GenerateRequest(model=TEXT, prompt="x"), metadata=self.metadata, timeout=2
                )
            except grpc.aio.AioRpcError:
                return False
            return True


def identity(parts: Authority, folder: Path, name: str) -> Identity:
    path, key = parts.issue(folder / f"{name}.pem", f"spiffe://lingqu/{name}", HOSTS)
    return Identity(path, key, parts.certificate)


@pytest.fixture(scope="module")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    folder = tmp_path_factory.mktemp("tls")
    layout = Layout(folder, free_offset())
    parts, clients = Authority.at(folder / "ca"), Authority.at(folder / "ca", "clients")
    own = identity(parts, folder, "gateway")
    public = parts.issue(folder / "public.pem", hosts=HOSTS)
    backend, snapshots, keys = Backend(), Snapshots(), KeyRing.at(folder / "key.pem")
    control = grpc.aio.server()
    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(Ads(snapshots), control)
    port = tls.listen(control, "127.0.0.1:0", own)
    await control.start()
    (folder / "sds").mkdir()
    for name, body in secret_files(own).items():
        (folder / "sds" / name).write_text(json.dumps(body))
    address = f"127.0.0.1:{port}"
    boot = bootstrap("test", address, layout.address(ENVOY_ADMIN), secrets=folder / "sds")
    async with (
        gateways.serving(backend, identity(parts, folder, "inference")) as upstream,
        metrics.running(folder / "metrics", identity=identity(parts, folder, "metrics")) as collector,
        gateways.envoy_running(layout, boot),
    ):
        entry = Entry(layout.address(PUBLIC), address, keys.jwks(), metrics=collector.address)
        suite = Suite(
            folder, entry.listen, upstream, parts, clients, SecretFiles(public, clients.certificate, own),
            backend, entry, snapshots, keys.mint("tester").key, collector,
        )  # fmt: skip
        await suite.publish()
        await until(suite.serves, f"Envoy serves: {folder}/envoy.log")
        yield suite
    await control.stop(0)


async def test_what_is_plain_is_not_answered(suite: Suite) -> None:
    async with grpc.aio.insecure_channel(suite.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(
                pb.GenerateRequest(model=TEXT, prompt="x"), metadata=suite.metadata, timeout=5
            )
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_parts_answer_nobody_without_a_certificate(suite: Suite) -> None:
    ca = suite.parts.certificate.read_bytes()
    client = suite.clients.issue(suite.folder / "client.pem", common_name="mallory")
    stranger = grpc.ssl_channel_credentials(ca, client[1].read_bytes(), client[0].read_bytes())
    for credentials in (grpc.ssl_channel_credentials(ca), stranger):
        async with grpc.aio.secure_channel(suite.upstream, credentials) as channel:
            stub: Any = InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Generate(pb.GenerateRequest(model=TEXT, prompt="x"), timeout=5)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"uri": "spiffe://example.org/team/ns/alice", "common_name": "x"}, "alice"),
        ({"common_name": "bob"}, "bob"),
        ({"hosts": ("carol.example.org",), "common_name": "no name: has spaces"}, "carol.example.org"),
    ],
)
async def test_a_client_may_be_known_by_its_certificate(
    suite: Suite, names: dict[str, Any], expected: str
) -> None:
    own = suite.clients.issue(suite.folder / "known.pem", **names)
    suite.backend.asked.clear()
    async with suite.stub(own) as stub:
        request = pb.GenerateRequest(model=TEXT, prompt="x")
        await stub.Generate(request, metadata=(("x-lingqu-client", "boss"),))
        await stub.Generate(request, metadata=suite.metadata)  # with a key, it is the key's
    assert [headers["x-lingqu-client"] for _, headers in suite.backend.asked] == [expected, "tester"]


async def test_envoy_tells_of_requests_as_a_part(suite: Suite) -> None:
    """Also after its certificate, or that of the metrics service, was renewed."""

    async def asked() -> None:
        before = len(suite.metrics.store.values("requests", model=TEXT))
        assert await suite.serves()
        await until(lambda: len(suite.metrics.store.values("requests", model=TEXT)) > before, "it was told")

    await asked()
    for part in ("gateway", "metrics"):
        identity(suite.parts, suite.folder, part)
    await suite.publish()
    await asked()


async def test_certificates_that_say_nothing_of_a_client_do_not_count(suite: Suite) -> None:
    nameless = suite.clients.issue(suite.folder / "nameless.pem", common_name="../../etc")
    request = pb.GenerateRequest(model=TEXT, prompt="x")
    for own in (None, nameless):
        async with suite.stub(own) as stub:
            for metadata in ((), (("x-lingqu-client", "boss"),)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Generate(request, metadata=metadata, timeout=5)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Generate(request, metadata=(("authorization", "Bearer nonsense"),), timeout=5)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_part_is_no_client(suite: Suite) -> None:
    own = suite.parts.issue(suite.folder / "part.pem", "spiffe://lingqu/boss", HOSTS)
    async with suite.stub(own) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(pb.GenerateRequest(model=TEXT, prompt="x"), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_certificates_are_renewed_while_a_stream_goes_on(suite: Suite) -> None:
    """The public one, Envoy's own and the backend's."""
    suite.backend.hold.clear()
    before = await suite.serial()
    async with suite.stub() as stub:
        call = stub.StreamGenerate(pb.GenerateRequest(model=TEXT, prompt="one two"), metadata=suite.metadata)
        assert (await call.read()).text == "one"
        suite.parts.issue(suite.folder / "public.pem", hosts=HOSTS)
        for part in ("gateway", "inference"):
            identity(suite.parts, suite.folder, part)
        await suite.publish()

        async def renewed() -> bool:
            return await suite.serial() != before

        await until(renewed, "new connections get the new certificate")
        assert await suite.serves()
        suite.backend.hold.set()
        assert (await call.read()).text == "two"
        assert await call.code() == grpc.StatusCode.OK


@asynccontextmanager
async def grpcio(backend: Backend, own: Identity) -> AsyncIterator[str]:
    """The server of the other services."""
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(backend, server)
    port = tls.listen(server, "127.0.0.1:0", own)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.mark.parametrize("serving", [gateways.serving, grpcio])
async def test_a_server_uses_what_its_files_say_now(tmp_path: Path, serving: Any) -> None:
    parts = Authority.at(tmp_path)
    own, caller = identity(parts, tmp_path, "inference"), identity(parts, tmp_path, "gateway")
    backend = Backend()
    async with serving(backend, own) as address:

        async def presented() -> int:
            context = ssl.create_default_context(cafile=str(parts.certificate))
            context.load_cert_chain(caller.certificate, caller.key)
            context.set_alpn_protocols(["h2"])
            host, port = address.split(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
            shown: Any = writer.get_extra_info("ssl_object")
            writer.close()
            assert shown.selected_alpn_protocol() == "h2"
            return x509.load_der_x509_certificate(shown.getpeercert(binary_form=True)).serial_number

        first = await presented()
        assert await presented() == first
        own.certificate.write_bytes(b"half wri")
        assert await presented() == first
        identity(parts, tmp_path, "inference")

        async def renewed() -> bool:
            return await presented() != first

        await until(renewed, "new connections get the new certificate")
        async with tls.channel(address, [], caller) as channel:
            stub: Any = InferenceServiceStub(channel)
            assert (await stub.Generate(pb.GenerateRequest(model=TEXT, prompt="x"))).text == "x"


async def test_a_server_that_stops_during_a_handshake_serves_nobody_after_it(tmp_path: Path) -> None:
    parts = Authority.at(tmp_path)
    own, caller = identity(parts, tmp_path, "inference"), identity(parts, tmp_path, "gateway")
    async with gateways.serving(Backend(), own) as address:
        host, port = address.split(":")
        early = socket.create_connection((host, int(port)))
        early.setblocking(False)
    context = ssl.create_default_context(cafile=str(parts.certificate))
    context.load_cert_chain(caller.certificate, caller.key)
    async with asyncio.timeout(5):
        with suppress(ConnectionError):  # or it is not let in at all
            reader, writer = await asyncio.open_connection(sock=early, ssl=context, server_hostname=host)
            assert await reader.read() == b""
            writer.close()


async def test_a_client_uses_what_its_files_say_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that begin after a renewal show the new certificate; a stream goes on with the old one."""
    monkeypatch.setattr(renewal, "LOOK_S", 0.0)
    parts = Authority.at(tmp_path)
    own, caller = identity(parts, tmp_path, "inference"), identity(parts, tmp_path, "gateway")
    seen: list[int] = []

    class Noting(Backend):
        def _heard(self, request: Any, context: Any, *, streams: bool = False) -> None:
            (pem,) = context.auth_context()["x509_pem_cert"]
            seen.append(x509.load_pem_x509_certificate(pem).serial_number)

    backend = Noting()
    async with gateways.serving(backend, own) as address, tls.channel(address, [], caller) as channel:
        stub: Any = InferenceServiceStub(channel)

        async def shown() -> int:
            await stub.Generate(pb.GenerateRequest(model=TEXT, prompt="x"), timeout=5)
            return seen[-1]

        stream = stub.StreamGenerate(pb.GenerateRequest(model=TEXT, prompt="one two"), timeout=20)
        assert (await stream.read()).text == "one"
        first = await shown()
        assert seen == [first, first]

        caller.certificate.write_bytes(b"half wri")
        assert await shown() == first
        identity(parts, tmp_path, "other")
        caller.key.write_bytes((tmp_path / "other-key.pem").read_bytes())
        assert await shown() == first

        identity(parts, tmp_path, "gateway")
        second = await shown()
        assert second != first
        assert await shown() == second
        assert _connections(address) == 2
        backend.hold.set()
        assert (await stream.read()).text == "two"
        assert await stream.code() == grpc.StatusCode.OK
        del stream  # gRPC keeps a connection as long as somebody has a call of it
        await until(lambda: _connections(address) == 1, "the former connection is closed")


def _connections(address: str) -> int:
    """How many this process has to an address of its own."""
    port = int(address.rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return sum(c.status == "ESTABLISHED" and bool(c.raddr) and c.raddr.port == port for c in found)


async def test_rest_of_inference_asks_for_a_certificate_and_renews_its_own(tmp_path: Path) -> None:
    parts = Authority.at(tmp_path)
    own, caller = identity(parts, tmp_path, "inference"), identity(parts, tmp_path, "gateway")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serving_http(app, "127.0.0.1:0", 1.0, own) as address:
        known = ssl.create_default_context(cafile=str(parts.certificate))
        known.load_cert_chain(caller.certificate, caller.key)
        async with httpx.AsyncClient(verify=known, trust_env=False) as client:
            assert (await client.get(f"https://{address}/")).status_code == 204
        unknown = ssl.create_default_context(cafile=str(parts.certificate))
        async with httpx.AsyncClient(verify=unknown, trust_env=False) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"https://{address}/")

        async def presented() -> int:
            host, port = address.split(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=known)
            found: Any = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return x509.load_der_x509_certificate(found).serial_number

        first = await presented()
        identity(parts, tmp_path, "inference")

        async def renewed() -> bool:
            return await presented() != first

        await until(renewed, "new connections get the new certificate")


async def test_a_key_of_another_certificate_is_not_used(tmp_path: Path) -> None:
    parts, changed = Authority.at(tmp_path), asyncio.Event()
    public, key = parts.issue(tmp_path / "public.pem", hosts=HOSTS)
    watched = WatchedSecrets(SecretFiles((public, key)), changed.set)
    first = watched.current
    watching = asyncio.ensure_future(watched.run())
    try:
        parts.issue(tmp_path / "other.pem", hosts=HOSTS)
        key.write_bytes((tmp_path / "other-key.pem").read_bytes())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(LOOK_S * 1.5):
                await changed.wait()
        assert watched.current == first
        public.write_bytes((tmp_path / "other.pem").read_bytes())
        async with asyncio.timeout(LOOK_S * 3):
            await changed.wait()
        assert watched.current != first
        assert first.public is not None
        assert first.public.key not in repr(first)
    finally:
        watching.cancel()


def test_settings_of_tls_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, said in (
        ("LINGQU_TLS_KEY", "x.pem", "go together"),
        ("LINGQU_TLS_CLIENT_CA", "x.pem", "needs LINGQU_TLS_CERTIFICATE"),
        ("LINGQU_MTLS_CA", "x.pem", "go together"),
        ("LINGQU_CORS_ORIGINS", "app.example", "is not like"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValidationError, match=said):
                GatewaySettings()
    given = {"tls_certificate": "x.pem", "tls_key": "y.pem"}
    assert GatewaySettings(**given).secret_files.public == (Path("x.pem"), Path("y.pem"))
    with pytest.raises(ValidationError, match="whoever reaches it"):
        GatewaySettings(**given, gateway_listen="0.0.0.0:8081")
