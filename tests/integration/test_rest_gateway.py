"""REST through a real Envoy with the gateway's own configuration, in front of servers that tell what reached
them: who is asked by the model in a body, and what Envoy answers by itself."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx2 as httpx
import pytest

from deploy.local.layout import PUBLIC, Layout
from deploy.local.parts import envoy
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.core.rest import MAX_BODY_BYTES
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.snapshot import snapshot
from services.gateway.view import view
from tests.conftest import free_offset
from tests.statics import static
from tests.waiting import until

CHAT = "/v1/chat/completions"


class Upstream:
    """An HTTP/1.1 server that answers with what it was sent; `status` first, as often as it is set."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.statuses: list[int] = []
        self.asked = 0
        self.gone = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                first, *lines = head.split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                body = await self._body(reader, headers)
                self.asked += 1
                if "/stream" in first:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                    writer.write(b"transfer-encoding: chunked\r\n\r\n6\r\nfirst\n\r\n")
                    await reader.read()
                    self.gone.set()
                    return
                status = self.statuses.pop() if self.statuses else 200
                said = {"server": self.name, "line": first, "headers": headers, "size": len(body)}
                answer = json.dumps(said).encode()
                writer.write(
                    f"HTTP/1.1 {status} X\r\ncontent-length: {len(answer)}\r\n\r\n".encode() + answer
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return await reader.readexactly(int(headers.get("content-length", 0)))
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return body


class Gate:
    def __init__(self, address: str, key: str, upstreams: dict[str, Upstream]) -> None:
        self.address = address
        self.key = key
        self.upstreams = upstreams
        self.client = httpx.AsyncClient(base_url=f"http://{address}", timeout=20, trust_env=False)
        self.client.headers["authorization"] = f"Bearer {key}"

    async def post(self, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return await self.client.post(path, content=content, headers=given)


@pytest.fixture(scope="module")
async def gate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gate]:
    folder = tmp_path_factory.mktemp("gate")
    layout = Layout(folder, free_offset())
    upstreams = {name: Upstream(name) for name in ("one", "two", "away")}
    for upstream in upstreams.values():
        await upstream.start()

    def version(model: str, number: int) -> Version:
        return Version(VersionKey(model, number), "file:///x", "0", "generate", "x")

    models = [
        Model("alone", (version("alone", 1),), ((1, 100),)),
        Model("split", (version("split", 1), version("split", 2)), ((1, 50), (2, 50))),
        Model("nowhere", (version("nowhere", 1),), ((1, 100),)),
    ]
    hosts = {"one": (("alone", 1), ("split", 1)), "two": (("split", 2),)}
    replicas = [
        Replica(
            name,
            "inference",
            {"http": upstreams[name].address, "grpc": "127.0.0.1:1", "oip": "127.0.0.1:1"},
            tuple(Hosted(VersionKey(*key), READY) for key in hosted),
        )
        for name, hosted in hosts.items()
    ]
    keys = KeyRing.at(folder / "key.pem")
    entry = Entry(layout.address(PUBLIC), "127.0.0.1:1", keys.jwks())
    config = folder / "envoy.json"
    config.write_text(json.dumps(static(snapshot(view(replicas, models), entry))))
    process = await asyncio.create_subprocess_exec(
        envoy(layout).argv[0], "-c", str(config), "--disable-hot-restart", "--concurrency", "1",
        "--log-level", "warn",
    )  # fmt: skip
    try:
        made = Gate(entry.listen, keys.mint("tester").key, upstreams)

        async def answers() -> bool:
            try:
                return (await made.client.get("/v1/models")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers, "Envoy answers")
        yield made
        await made.client.aclose()
        assert process.returncode is None, "Envoy did not live to the end"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_the_model_in_the_body_chooses_the_server(gate: Gate) -> None:
    answer = await gate.post({"messages": [{"model": "split"}], "model": "alone"})
    told = answer.json()
    assert told["server"] == "one"
    assert told["headers"]["x-lingqu-model"] == "alone"
    assert told["headers"]["x-lingqu-model-version"] == "1"
    assert told["headers"]["x-lingqu-client"] == "tester"
    assert "authorization" not in told["headers"]


async def test_shares_of_versions_hold_for_rest(gate: Gate) -> None:
    answers = [await gate.post({"model": "split"}, path="/v1/embeddings") for _ in range(60)]
    servers = Counter((a.json()["server"], a.json()["headers"]["x-lingqu-model-version"]) for a in answers)
    assert set(servers) == {("one", "1"), ("two", "2")}
    assert min(servers.values()) > 10


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain", ""]
)
async def test_the_name_of_the_content_does_not_matter(gate: Gate, kind: str) -> None:
    answer = await gate.post({"model": "split"}, content_type=kind)
    assert "x-lingqu-model-version" in answer.json()["headers"]


async def test_no_content_type_is_fine(gate: Gate) -> None:
    request = gate.client.build_request("POST", CHAT, content=b'{"model": "alone"}')
    assert "content-type" not in request.headers
    told = (await gate.client.send(request)).json()
    assert told["headers"]["x-lingqu-model-version"] == "1"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"model"', b"\xff\xfe", b'{"model": 7}', b'{"model": null}', b"{}",
        b'{"model": "no such"}', b'{"model": "missing"}', b'{"model": ["alone"]}', b'{"model": "\\ud800"}',
        b'{"model": "' + b"x" * 100_000 + b'"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"model": NaN}',
    ],
    ids=lambda body: body[:20].decode(errors="replace"),
)  # fmt: skip
async def test_what_names_no_model_reaches_some_server(gate: Gate, body: bytes) -> None:
    """Which says precisely what is wrong; Envoy need not."""
    answer = await gate.post(body)
    assert answer.status_code == 200
    assert answer.json()["size"] == len(body)
    assert "x-lingqu-model-version" not in answer.json()["headers"]


async def test_deep_json_does_not_end_envoy(gate: Gate) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        depth = MAX_BODY_BYTES // (len(opening) + len(closing)) - 100
        for body in (opening * depth, opening * depth + b"1" + closing * depth):
            answer = await gate.post(b'{"model": "alone", "x": ' + body + b"}")
            assert answer.json()["size"] == len(body) + 25
    assert (await gate.post({"model": "alone"})).status_code == 200


async def test_no_client_chooses_its_version_or_name(gate: Gate) -> None:
    forged = {"x_lingqu_model": "split", "x_lingqu_model_version": "2", "x_lingqu_client": "boss"}
    told = (await gate.post(b"{}", **forged)).json()["headers"]
    assert told["x-lingqu-model"] == "<none>"
    assert "x-lingqu-model-version" not in told
    assert told["x-lingqu-client"] == "tester"


async def test_bodies_up_to_the_limit_pass_and_no_larger_ones(gate: Gate) -> None:
    def sized(size: int) -> bytes:
        frame = b'{"model": "alone", "x": ""}'
        return frame[:-2] + b"x" * (size - len(frame)) + frame[-2:]

    passed = await gate.post(sized(MAX_BODY_BYTES - 100_000))
    assert passed.json()["size"] == MAX_BODY_BYTES - 100_000
    refused = await gate.post(sized(MAX_BODY_BYTES + 200_000))
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "request_too_large"


async def test_a_chunked_body_is_read_too(gate: Gate) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"mod', b'el": "al', b'one"}'):
            yield piece

    answer = await gate.client.post(CHAT, content=pieces())
    assert answer.json()["headers"]["x-lingqu-model-version"] == "1"


async def test_other_paths_go_to_any_server(gate: Gate) -> None:
    servers = {(await gate.client.get("/v1/models")).json()["server"] for _ in range(20)}
    assert servers <= {"one", "two"}
    assert (await gate.client.get("/openapi.json")).status_code == 200
    assert (await gate.client.get("/v1/models/alone")).json()["line"].startswith("GET /v1/models/alone ")


def error(answer: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["code"] == code
    assert found["message"]
    return found


async def test_envoys_own_errors_are_openais(gate: Gate) -> None:
    no_key = await httpx.AsyncClient(trust_env=False).post(
        f"http://{gate.address}{CHAT}", json={"model": "alone"}
    )
    assert error(no_key, 401, "invalid_api_key")["type"] == "authentication_error"
    error(await gate.post({"model": "alone"}, authorization="Bearer nonsense"), 401, "invalid_api_key")
    nowhere = await gate.post({"model": "nowhere"})
    assert error(nowhere, 503, "backend_unavailable")["type"] == "api_error"
    assert nowhere.headers["retry-after"] == "1"
    error(await gate.client.get("/elsewhere"), 404, "not_found")


async def test_grpc_errors_stay_what_they_were(gate: Gate) -> None:
    for key, model, code in (
        ("", "alone", grpc.StatusCode.UNAUTHENTICATED),
        (gate.key, "nowhere", grpc.StatusCode.UNAVAILABLE),
        (gate.key, "missing", grpc.StatusCode.NOT_FOUND),
    ):
        async with grpc.aio.insecure_channel(gate.address) as channel:
            metadata = (("authorization", f"Bearer {key}"),) if key else ()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await InferenceServiceStub(channel).Generate(  # type: ignore[misc]
                    pb.GenerateRequest(model=model, prompt="x"), metadata=metadata, timeout=20
                )
            assert refused.value.code() == code
            assert any(
                name == "grpc-status-details-bin" for name, _ in refused.value.trailing_metadata() or ()
            )


async def test_a_server_that_cannot_is_asked_again(gate: Gate) -> None:
    one = gate.upstreams["one"]
    before, one.statuses = one.asked, [503, 503]
    assert (await gate.post({"model": "alone"})).status_code == 200
    assert one.asked - before == 3


async def test_a_stream_is_passed_on_at_once_and_its_end_too(gate: Gate) -> None:
    upstream = gate.upstreams["one"]
    async with gate.client.stream("POST", f"{CHAT}/stream", content=b'{"model": "alone"}') as answer:
        async for piece in answer.aiter_bytes():
            assert piece == b"first\n"
            break
    async with asyncio.timeout(5):
        await upstream.gone.wait()
