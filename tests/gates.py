"""A real Envoy with the gateway's own configuration in front of servers that tell what reached them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx

from deploy.local.layout import PUBLIC, Layout
from deploy.local.parts import envoy
from lingqu.client import LingquError
from services.core.access import Access
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.core.identity import AUDIENCE, ISSUER
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.snapshot import snapshot
from services.gateway.view import view
from tests.conftest import free_offset
from tests.statics import static
from tests.waiting import until

CHAT = "/v1/chat/completions"
GENERATE = "/lingqu.inference.v1.InferenceService/Generate"
INFER = "/inference.GRPCInferenceService/ModelInfer"
DESCRIBE = "/inference.GRPCInferenceService/ModelMetadata"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass
class Call:
    """What reached a backend: the path, its headers, and the messages or the body."""

    path: str
    headers: dict[str, str]
    messages: list[bytes] = attribute(default_factory=list)


class GrpcBackend(grpc.GenericRpcHandler):
    """Takes every method, notes its messages as they are, and answers each with an empty one."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((self,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            headers = {k: str(v) for k, v in context.invocation_metadata() or ()}
            call = Call(details.method, headers)
            self.calls.append(call)
            async for message in requests:
                call.messages.append(message)
                yield b""

        return grpc.stream_stream_rpc_method_handler(answer)


class RestBackend:
    """An HTTP/1.1 server that notes what it was sent and answers 200 with `{}`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode(errors="replace"):
                first, *lines = head.split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.calls.append(Call(first.split(" ")[1], headers, [body]))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@dataclass
class Gate:
    """`address` is Envoy's public port; `text`, `tensor` and `rest` are what stands behind it."""

    address: str
    keys: KeyRing
    text: GrpcBackend
    tensor: GrpcBackend
    rest: RestBackend
    pinned: bool = False


@asynccontextmanager
async def gate(
    folder: Path,
    models: Sequence[str],
    access: Access | None = None,
    *,
    pinned: bool = False,
    **settings: Any,
) -> AsyncIterator[Gate]:
    """All models are on one replica; `pinned`: with a newer version that takes no traffic. `settings` are
    further fields of Entry."""
    layout = Layout(folder, free_offset())
    made = Gate("", KeyRing.at(folder / "key.pem"), GrpcBackend(), GrpcBackend(), RestBackend(), pinned)
    async with AsyncExitStack() as stack:
        endpoints = {
            name: await stack.enter_async_context(backend.serving())
            for name, backend in (("grpc", made.text), ("oip", made.tensor), ("http", made.rest))
        }
        versions = [Version(VersionKey(name, 1), "file:///x", "0", "generate", "x") for name in models]
        hosted = tuple(Hosted(v.key, READY) for v in versions)
        newer = (
            [replace(v, key=VersionKey(v.key.model, 2)) for v in versions]
            if pinned
            else [None] * len(versions)
        )
        known = [
            Model(v.key.model, (v,) if n is None else (v, n), ((1, 100),))
            for v, n in zip(versions, newer, strict=True)
        ]
        entry = Entry(layout.address(PUBLIC), "127.0.0.1:1", made.keys.jwks(), **settings)
        now = view([Replica("r", "inference", endpoints, hosted)], known, access)
        config = folder / "envoy.json"
        config.write_text(json.dumps(static(snapshot(now, entry))))
        made.address = entry.listen
        await stack.enter_async_context(running_envoy(config, layout))
        yield made


@asynccontextmanager
async def running_envoy(config: Path, layout: Layout) -> AsyncIterator[None]:
    """Until it takes connections; ends with the block, and must not have ended by itself before."""
    process = await asyncio.create_subprocess_exec(
        envoy(layout).argv[0], "-c", str(config), "--disable-hot-restart", "--concurrency", "1",
        "--log-level", "warn",
    )  # fmt: skip
    try:

        async def connects() -> bool:
            assert process.returncode is None, "Envoy ended"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", layout.port(PUBLIC))
            except OSError:
                return False
            writer.close()
            return True

        await until(connects, "Envoy listens")
        yield
        assert process.returncode is None, "Envoy did not live to the end"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def field_of(number: int, value: bytes) -> bytes:
    """A field of a message as it is on the wire."""
    return bytes([number << 3 | 2, len(value)]) + value


def signed(keys: KeyRing, client: str = "tester", **claims: object) -> str:
    """A key with claims of our choice."""
    now = int(time.time())
    body = {"iss": ISSUER, "aud": AUDIENCE, "sub": client, "iat": now, "exp": now + 60, "jti": "k1", **claims}
    return keys.sign(body)


class Calls:
    """Calls through one gate by one key: "" for what passed, otherwise the reason of the refusal."""

    def __init__(self, address: str, key: str) -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._client = httpx.AsyncClient(
            base_url=f"http://{address}", trust_env=False, verify=False, headers=dict(self._metadata)
        )

    async def grpc(
        self, path: str, message: bytes, compression: grpc.Compression | None = None
    ) -> tuple[str, str]:
        """The status and the reason."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            call: Any = channel.unary_unary(path)
            try:
                await call(message, metadata=self._metadata, timeout=10, compression=compression)
            except grpc.aio.AioRpcError as err:
                error = LingquError(err)
                return error.code.name, error.reason
        return "OK", ""

    async def rest(self, content: bytes, path: str = CHAT) -> tuple[int, str | None]:
        """The status and the code of the error."""
        answer = await self._client.post(path, content=content)
        body = answer.json()
        return answer.status_code, body["error"]["code"] if "error" in body else ""

    async def status(self, path: str, content: bytes) -> int:
        return (await self._client.post(path, content=content)).status_code

    async def grpc_web(self, path: str, content: bytes) -> str:
        """The gRPC status, of the headers or of the trailers in the body."""
        headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
        answer = await self._client.post(path, content=content, headers=headers)
        found = re.search(rb"grpc-status: ?(\d+)", answer.content)
        return answer.headers.get("grpc-status") or (found[1].decode() if found else "")

    async def get(self, path: str) -> int:
        return (await self._client.get(path)).status_code
