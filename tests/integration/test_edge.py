"""What nobody sends by accident, to a real Envoy with the gateway's configuration: it refuses precisely,
gives nothing away, keeps its memory, and goes on serving."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from services.gateway.bootstrap import bootstrap
from services.gateway.edge import MAX_HEADERS_KIB, MAX_MESSAGE_BYTES, MAX_STREAMS, Times
from tests import gateways, http2
from tests.gateways import TENSOR, TEXT, Gateway
from tests.http2 import Connection, frame
from tests.waiting import pause, until

GENERATE = "/lingqu.inference.v1.InferenceService/Generate"
TIMES = Times(headers=0.5, request=1.6, silence=0.8, flush=1, idle=1.5)
MARGIN_S = 4.0
# What a flood may cost while it goes on, beside what Envoy takes anyway.
GROWTH_BYTES = 200 << 20


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with gateways.running(tmp_path_factory.mktemp("edge"), times=TIMES) as gateway:
        yield gateway


@pytest.fixture
async def gateway(shared: Gateway) -> AsyncIterator[Gateway]:
    """After every test it serves, and has not grown by much."""
    before = shared.memory
    shared.backend.asked.clear()
    yield shared
    shared.backend.hold.set()
    await until(shared.serves, "Envoy serves afterwards")
    shared.backend.hold.clear()
    assert shared.memory - before < GROWTH_BYTES


def asking(gateway: Gateway, path: str = GENERATE, **more: str) -> bytes:
    """A header block of a gRPC request."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc", "authorization": f"Bearer {gateway.key}", **more}
    return http2.block(fields.items())


def prompt(text: str, model: str = TEXT) -> bytes:
    return pb.GenerateRequest(model=model, prompt=text).SerializeToString()


async def ended(connection: Connection, stream: int, within_s: float) -> None:
    """The stream is answered or reset, or the whole connection closed."""
    answer = await connection.of(
        stream, http2.RST_STREAM, http2.HEADERS, http2.GOAWAY, timeout_s=within_s + MARGIN_S
    )
    assert answer is not None or connection.closed.is_set()


@pytest.mark.parametrize("value", [" v", "v\t", "\xff\xfe", "v" * 30_000])
async def test_no_header_of_one_client_ends_the_streams_of_another(gateway: Gateway, value: str) -> None:
    """Envoy has them all in one connection to a backend, and tells it what they say."""
    async with gateway.channel() as channel:
        stub: Any = InferenceServiceStub(channel)
        stream = stub.StreamGenerate(pb.GenerateRequest(model=TEXT, prompt="a b"), metadata=gateway.metadata)
        assert (await stream.read()).text == "a"
        for name in ("x-some", "x-some-bin"):
            other = await Connection.open(gateway.address)
            block = asking(gateway, **{name: value})
            head = frame(http2.HEADERS, 0, 1, block[:16_000])
            head += frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[16_000:])
            await other.send(head + frame(http2.DATA, http2.END_STREAM, 1, http2.message(prompt("x"))))
            await ended(other, 1, 5)
            await other.close()
        gateway.backend.hold.set()
        assert (await stream.read()).text == "b"
        assert await stream.code() == grpc.StatusCode.OK


# Messages.


async def test_messages_up_to_the_limit_pass_and_larger_ones_are_refused_in_words(gateway: Gateway) -> None:
    async with gateway.channel() as channel:
        generate: Any = InferenceServiceStub(channel).Generate
        for size in (1 << 20, MAX_MESSAGE_BYTES - 1024):
            request = pb.GenerateRequest(model=TEXT, prompt="x" * size)
            assert len((await generate(request, metadata=gateway.metadata)).text) == size
        for size in (MAX_MESSAGE_BYTES + 1024, 64 << 20):
            with pytest.raises(grpc.aio.AioRpcError, match="up to 16 MiB") as refused:
                await generate(pb.GenerateRequest(model=TEXT, prompt="x" * size), metadata=gateway.metadata)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x00", b"\x00\x00\x00", http2.message(b"", length=0xFFFFFFFF), http2.message(b"x", length=9),
        http2.message(b"\xff" * 64), http2.message(b"\x0a\x7f"), http2.message(b"", flags=1),
        http2.message(b"x" * 8, flags=0xFF), http2.message(b"\x1f\x8b\x08\x00" + b"\x00" * 99, flags=1),
        http2.message(b"\x0a" + b"\xff" * 11), b"\x00" * 4096, b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=lambda body: body[:12].hex() or "nothing",
)  # fmt: skip
async def test_malformed_grpc_is_refused(gateway: Gateway, body: bytes) -> None:
    connection = await Connection.open(gateway.address)
    await connection.send(frame(http2.HEADERS, http2.END_HEADERS, 1, asking(gateway)))
    await connection.send(frame(http2.DATA, http2.END_STREAM, 1, body))
    await ended(connection, 1, 1)
    assert not gateway.backend.asked
    await connection.close()


# HTTP/2.

BAD_HPACK = b"\xff\xff\xff\xff\xff\xff\xff\xff"
MALFORMED = {
    "no preface": b"\x00" * 64,
    "half a preface": http2.PREFACE[:10] + b"GET / HTTP/1.1\r\n\r\n",
    "a frame of 16 MiB": frame(http2.DATA, 0, 1, b"", length=0xFFFFFF),
    "data of no stream": frame(http2.DATA, 0, 0, b"x"),
    "data of an idle stream": frame(http2.DATA, 0, 7, b"x"),
    "headers that are no HPACK": frame(http2.HEADERS, http2.END_HEADERS, 1, BAD_HPACK),
    "headers of an even stream": frame(http2.HEADERS, http2.END_HEADERS, 2, b"\x82"),
    "a continuation of nothing": frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"\x82"),
    "settings of odd length": frame(http2.SETTINGS, 0, 0, b"\x00" * 5),
    "settings of a stream": frame(http2.SETTINGS, 0, 1),
    "a window above 2^31": frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 0xFFFFFFFF)),
    "a promise": frame(http2.PUSH_PROMISE, http2.END_HEADERS, 1, b"\x00\x00\x00\x02\x82"),
    "a window update by nothing": frame(http2.WINDOW_UPDATE, 0, 0, b"\x00" * 4),
    "a window that overflows": frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "a reset of an idle stream": frame(http2.RST_STREAM, 0, 9, b"\x00" * 4),
    "a ping of three bytes": frame(http2.PING, 0, 0, b"abc"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_http2_ends_its_connection(gateway: Gateway, name: str) -> None:
    if "preface" in name:
        reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
        writer.write(MALFORMED[name])
        async with asyncio.timeout(TIMES.idle + MARGIN_S):
            await reader.read()
        writer.close()
        return
    connection = await Connection.open(gateway.address)
    await connection.send(MALFORMED[name])
    async with asyncio.timeout(MARGIN_S):
        await connection.closed.wait()
    await connection.close()


async def test_unknown_frames_are_ignored(gateway: Gateway) -> None:
    connection = await Connection.open(gateway.address)
    await connection.send(frame(0xEE, 0xFF, 0, b"whatever") + frame(0xEF, 0, 3, b""))
    await connection.send(frame(http2.HEADERS, http2.END_HEADERS, 1, asking(gateway)))
    await connection.send(frame(http2.DATA, http2.END_STREAM, 1, http2.message(prompt("x"))))
    assert await connection.of(1, http2.DATA) is not None
    await connection.close()


# Those who are slow.


@pytest.mark.parametrize(
    "begin", [b"", b"P", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: "], ids=["", "P", "headers"]
)
async def test_who_sends_no_whole_headers_is_hung_up_on(gateway: Gateway, begin: bytes) -> None:
    reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
    writer.write(begin)
    async with asyncio.timeout(TIMES.idle + MARGIN_S):
        await reader.read()
    writer.close()


async def test_headers_of_http2_that_never_end_are_not_waited_for(gateway: Gateway) -> None:
    connection = await Connection.open(gateway.address)
    await connection.send(frame(http2.HEADERS, 0, 1, asking(gateway)))
    async with asyncio.timeout(TIMES.idle + MARGIN_S):
        await connection.closed.wait()
    await connection.close()


@pytest.mark.parametrize("sent", [b"", http2.message(b"x", length=100)], ids=["nothing", "half"])
async def test_a_call_that_sends_no_message_ends(gateway: Gateway, sent: bytes) -> None:
    connection = await Connection.open(gateway.address)
    await connection.send(frame(http2.HEADERS, http2.END_HEADERS, 1, asking(gateway)))
    await connection.send(frame(http2.DATA, 0, 1, sent))
    began = time.monotonic()
    await ended(connection, 1, TIMES.silence)
    assert time.monotonic() - began > TIMES.silence / 2
    assert not gateway.backend.asked
    await connection.close()


async def test_who_was_too_slow_is_told_so(gateway: Gateway) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await pause(TIMES.silence * 2, "the rest comes too late")
        yield b"}"

    async with httpx.AsyncClient(trust_env=False, headers=dict(gateway.metadata)) as client:
        answer = await client.post(f"http://{gateway.address}/v1/chat/completions", content=slowly())
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("path", [GENERATE, "/v1/chat/completions"])
async def test_a_message_that_trickles_in_ends_too(gateway: Gateway, path: str) -> None:
    kind = "application/grpc" if path == GENERATE else "application/json"
    connection = await Connection.open(gateway.address)
    headers = asking(gateway, path, **{"content-type": kind})
    await connection.send(frame(http2.HEADERS, http2.END_HEADERS, 1, headers))
    await connection.send(frame(http2.DATA, 0, 1, http2.message(b"x", length=1000)))

    async def trickle() -> None:
        while True:
            await pause(TIMES.silence / 5, "a byte now and then")
            await connection.send(frame(http2.DATA, 0, 1, b"x"))

    slow = asyncio.ensure_future(trickle())
    try:
        await ended(connection, 1, TIMES.request)
    finally:
        slow.cancel()
    await connection.close()


async def test_a_stream_may_wait_for_its_tokens(gateway: Gateway) -> None:
    gateway.backend.hold.clear()
    async with gateway.channel() as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.StreamGenerate(
            pb.GenerateRequest(model=TEXT, prompt="one two"), metadata=gateway.metadata
        )
        assert (await call.read()).text == "one"
        await pause(TIMES.request + 0.4, "longer than any request may take")
        gateway.backend.hold.set()
        assert (await call.read()).text == "two"
        assert await call.code() == grpc.StatusCode.OK


async def test_a_stream_of_tensors_may_be_opened_before_it_is_needed(gateway: Gateway) -> None:
    ready = asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        await ready.wait()
        yield oip.ModelInferRequest(model_name=TENSOR)

    async with gateway.channel() as channel:
        call = oip_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
            requests(), metadata=gateway.metadata
        )
        reading = asyncio.ensure_future(call.read())
        await pause(TIMES.request + 0.4, "longer than any request may take")
        ready.set()
        assert (await reading).infer_response.model_name == TENSOR
        call.cancel()


async def test_who_reads_nothing_is_not_waited_for_and_not_stored_for(gateway: Gateway) -> None:
    """500 answers of 1 MiB each for somebody whose window is zero; others are served meanwhile."""
    connection = await Connection.open(gateway.address, window=0)
    before = gateway.memory
    request = pb.GenerateRequest(model=TEXT, prompt="x" * 1024, top_k=1024)
    body = http2.message(request.SerializeToString())
    for stream in range(1, 1001, 2):
        await connection.send(
            frame(http2.HEADERS, http2.END_HEADERS, stream, asking(gateway))
            + frame(http2.DATA, http2.END_STREAM, stream, body)
        )
    await until(lambda: len(gateway.backend.asked) == 500, "all are answered")
    assert await gateway.serves()
    assert gateway.memory - before < GROWTH_BYTES
    await connection.close()


# Floods.


async def test_header_bombs_are_refused(gateway: Gateway) -> None:
    for headers in (
        {f"x-{number}": "y" for number in range(200)},
        {"x": "y" * (MAX_HEADERS_KIB << 10)},
        {"authorization": "Bearer " + "y" * (MAX_HEADERS_KIB << 10)},
    ):
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://{gateway.address}/v1/models", headers=headers)
            assert answer.status_code == 431


async def test_a_header_that_is_referred_to_again_and_again_is_refused(gateway: Gateway) -> None:
    """A HPACK bomb: 4 KiB in the table, named by one byte each, 16,000 times a block."""
    name, value = b"x", b"y" * 3_900
    indexed = (
        b"\x40" + b"\x01" + name + b"\x7f" + bytes([(len(value) - 127) % 128 + 128, (len(value) - 127) >> 7])
    )
    connection = await Connection.open(gateway.address)
    before = gateway.memory
    await connection.send(
        frame(http2.HEADERS, http2.END_HEADERS, 1, asking(gateway) + indexed + value + b"\xbe" * 10_000)
    )
    await ended(connection, 1, 1)
    assert gateway.memory - before < GROWTH_BYTES
    await connection.close()


async def test_headers_continued_for_ever_end_the_connection(gateway: Gateway) -> None:
    connection = await Connection.open(gateway.address)
    await connection.send(frame(http2.HEADERS, 0, 1, asking(gateway)))
    piece = http2.block([("x", "y" * 16_000)])
    before = gateway.memory
    for _ in range(2_000):
        await connection.send(frame(http2.CONTINUATION, 0, 1, piece))
        if connection.closed.is_set():
            break
    assert connection.closed.is_set()
    assert gateway.memory - before < GROWTH_BYTES
    await connection.close()


async def test_rapid_resets_end_the_connection(gateway: Gateway) -> None:
    connection = await Connection.open(gateway.address)
    headers = asking(gateway)
    for stream in range(1, 20_001, 2):
        await connection.send(
            frame(http2.HEADERS, http2.END_HEADERS, stream, headers)
            + frame(http2.RST_STREAM, 0, stream, struct.pack(">I", 8))
        )
        if connection.closed.is_set():
            break
    async with asyncio.timeout(MARGIN_S):
        await connection.closed.wait()
    await connection.close()


PROVOKING = {
    "a window update by nothing": frame(http2.WINDOW_UPDATE, 0, 1, b"\x00" * 4),
    "a window that overflows": frame(http2.WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"),
    "data behind the end": frame(http2.DATA, http2.END_STREAM, 1, b"") + frame(http2.DATA, 0, 1, b"x"),
    "headers behind the end": frame(http2.DATA, http2.END_STREAM, 1, b"")
    + frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x82"),
}


@pytest.mark.parametrize("name", PROVOKING)
async def test_resets_that_envoy_is_provoked_to_end_the_connection(gateway: Gateway, name: str) -> None:
    """CVE-2025-8671: the client breaks the rules of its streams, so that it need not reset them itself."""
    connection = await Connection.open(gateway.address)
    headers = asking(gateway)
    for stream in range(1, 20_001, 2):
        provoking = http2.of_stream(PROVOKING[name], stream)
        await connection.send(frame(http2.HEADERS, http2.END_HEADERS, stream, headers) + provoking)
        if connection.closed.is_set():
            break
    async with asyncio.timeout(MARGIN_S):
        await connection.closed.wait()
    assert not gateway.backend.asked
    await connection.close()


@pytest.mark.parametrize(
    "piece",
    [
        frame(http2.SETTINGS, 0, 0), frame(http2.PING, 0, 0, b"12345678"),
        frame(http2.PRIORITY, 0, 1, b"\x00\x00\x00\x03\x10"),
        frame(http2.WINDOW_UPDATE, 0, 1, b"\x00\x00\x00\x01"), frame(http2.DATA, 0, 1),
    ],
    ids=["settings", "pings", "priorities", "windows", "empty data"],
)  # fmt: skip
async def test_floods_of_frames_that_carry_nothing_end_the_connection(gateway: Gateway, piece: bytes) -> None:
    reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
    writer.write(http2.PREFACE + frame(http2.SETTINGS, 0, 0))
    writer.write(frame(http2.HEADERS, http2.END_HEADERS, 1, asking(gateway)))
    before = gateway.memory
    try:
        for _ in range(3_000):
            writer.write(piece * 100)  # and read nothing of what is answered
            async with asyncio.timeout(1):
                await writer.drain()
    except (TimeoutError, ConnectionError):
        pass
    assert gateway.memory - before < GROWTH_BYTES
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(MARGIN_S):
            while await reader.read(1 << 16):
                pass
    writer.transport.abort()


async def test_more_streams_than_allowed_are_refused_not_stored(gateway: Gateway) -> None:
    connection = await Connection.open(gateway.address)
    for stream in range(1, 2 * MAX_STREAMS + 2, 2):
        await connection.send(frame(http2.HEADERS, http2.END_HEADERS, stream, asking(gateway)))
    refused = await connection.of(2 * MAX_STREAMS + 1, http2.RST_STREAM, timeout_s=MARGIN_S)
    assert refused is not None
    assert struct.unpack(">I", refused.payload) == (7,)  # REFUSED_STREAM: safe to try elsewhere
    await connection.close()


# What must not be believed, and what is not told.


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/../v1/models", "/grpc.health.v1.Health/%2e%2e/v1/models", "//v1//models",
        "/grpc.health.v1.Health/..%2fv1/models", "/grpc.health.v1.Health\\..\\v1/models",
        "/grpc.health.v1.Health/.%2e/v1/models", "/./v1/models", "/v1/models#/grpc.health.v1.Health/",
        "/V1/MODELS", "/v1/models;/grpc.health.v1.Health/", "http://x/grpc.health.v1.Health/../v1/models",
    ],
)  # fmt: skip
async def test_no_spelling_of_a_path_slips_past_authentication(gateway: Gateway, path: str) -> None:
    reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    async with asyncio.timeout(5):
        status = int((await reader.read()).split()[1])
    writer.close()
    assert status in (400, 401)


async def test_headers_that_could_be_taken_for_ours_are_refused(gateway: Gateway) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(
            f"http://{gateway.address}/v1/models", headers=[("x_lingqu_client", "boss"), *gateway.metadata]
        )
        assert answer.status_code == 400


async def test_no_client_steers_envoy(gateway: Gateway) -> None:
    """Only its own headers would let a client shorten time-outs, retry, or name upstreams."""
    steering = (
        ("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-max-retries", "100"),
        ("x-envoy-force-trace", "true"), ("x-envoy-internal", "true"), ("x-envoy-retry-on", "5xx"),
        ("x-forwarded-client-cert", "Subject=boss"), ("x-lingqu-client", "boss"), ("x-lingqu-model", "other"),
    )  # fmt: skip
    async with gateway.channel() as channel:
        stub: Any = InferenceServiceStub(channel)
        await stub.Generate(
            pb.GenerateRequest(model=TEXT, prompt="x"), metadata=(*gateway.metadata, *steering), timeout=5
        )
    ((_, headers),) = gateway.backend.asked
    gateway.backend.asked.clear()
    assert not {name for name, _ in steering if name.startswith(("x-envoy", "x-forwarded"))} & set(headers)
    assert headers["x-lingqu-client"] == "tester"
    assert "x-lingqu-model" not in headers


@pytest.mark.parametrize("path", ["/v1/models", "/elsewhere", GENERATE, "/openapi.json"])
async def test_answers_do_not_tell_who_made_them(gateway: Gateway, path: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for headers in ({}, dict(gateway.metadata)):
            answer = await client.get(f"http://{gateway.address}{path}", headers=headers)
            assert "server" not in answer.headers
            assert not [name for name in answer.headers if name.startswith("x-envoy")]


# Memory.


async def test_when_memory_runs_short_streams_are_given_up_and_envoy_lives(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """600 MiB of messages that never end, against 192 MiB of heap."""
    async with gateways.running(tmp_path_factory.mktemp("heap"), heap_bytes=192 << 20) as gateway:
        connections = [await Connection.open(gateway.address) for _ in range(4)]
        body, peak = b"x" * 16_000, 0

        async def fill(connection: Connection) -> None:
            nonlocal peak
            for stream in range(1, 21, 2):
                begun = frame(http2.HEADERS, http2.END_HEADERS, stream, asking(gateway))
                await connection.send(
                    begun + frame(http2.DATA, 0, stream, http2.message(b"", length=15 << 20))
                )
                for _ in range(1000):
                    if connection.closed.is_set():
                        return
                    async with asyncio.timeout(1):
                        await connection.send(frame(http2.DATA, 0, stream, body))
                peak = max(peak, gateway.memory)

        await asyncio.gather(*(fill(connection) for connection in connections), return_exceptions=True)
        peak = max(peak, gateway.memory)
        for connection in connections:
            await connection.close()
        assert peak < 512 << 20
        await until(gateway.serves, "Envoy serves again")


def test_the_admin_interface_is_for_loopback_only() -> None:
    for admin in ("0.0.0.0:9901", "[::]:9901", "10.0.0.1:9901"):
        with pytest.raises(ValueError, match="open to others"):
            bootstrap("x", "127.0.0.1:1", admin)
