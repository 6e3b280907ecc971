"""The gRPC server of the inference service: with grpcio's client, and with frames that no client sends."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import logging
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NoOpTracer

from deploy.local.layout import INFERENCE
from services.core import http2
from services.core.http2.messages import Reader
from services.core.interceptors import server_stack
from services.core.lifecycle import serving
from tests import http2 as raw
from tests.conftest import free_offset
from tests.waiting import forever, pause, until

MOST = 1 << 20  # bytes of a message
SERVICE = "test.Shapes"
HEADERS = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", f"/{SERVICE}/Echo"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


@dataclass
class Shapes:
    """Methods of every shape, of bytes; what they saw, and how many of them run."""

    running: int = 0
    written: int = 0
    metadata: list[tuple[str, Any]] = field(default_factory=list)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def ran(self) -> AsyncIterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def echo(self, request: bytes, context: Any) -> bytes:
        async with self.ran():
            self.metadata = list(context.invocation_metadata())
            return request

    async def hang(self, request: bytes, context: Any) -> bytes:
        async with self.ran():
            await forever()
        return b""

    async def held(self, request: bytes, context: Any) -> bytes:
        async with self.ran():
            await self.let_go.wait()
        return request

    async def told(self, request: bytes, context: Any) -> bytes:
        """The status that the request names."""
        await context.send_initial_metadata((("first", "1"), ("first-bin", b"\0\xff")))
        details = (("last", "2"), ("last-bin", b"\1"))
        await context.abort(list(grpc.StatusCode)[int(request)], "naïve 100 %\n", details)

    async def boom(self, request: bytes, context: Any) -> bytes:
        raise ValueError("secret")

    async def words(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """As many messages as the request says, and of so many bytes."""
        number, size = map(int, request.split())
        async with self.ran():
            for _ in range(number):
                yield b"w" * size
                self.written += 1

    async def writes(self, request: bytes, context: Any) -> None:
        for word in request.split():
            await context.write(word)

    async def joined(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b" ".join([request async for request in requests])

    async def upper(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async with self.ran():
            async for request in requests:
                yield request.upper()

    def handler(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, Any] = {
            "Echo": unary(self.echo),
            "Hang": unary(self.hang),
            "Held": unary(self.held),
            "Told": unary(self.told),
            "Boom": unary(self.boom),
            "Words": stream(self.words),
            "Writes": stream(self.writes),
            "Joined": grpc.stream_unary_rpc_method_handler(self.joined),
            "Upper": grpc.stream_stream_rpc_method_handler(self.upper),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


@dataclass
class Served:
    shapes: Shapes
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel

    def unary(self, method: str, request: bytes, **more: Any) -> Any:
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(request, **more)

    def stream(self, method: str, request: bytes, **more: Any) -> Any:
        return self.channel.unary_stream(f"/{SERVICE}/{method}")(request, **more)

    async def well(self) -> bool:
        """It answers, and nothing of what came before is left."""
        assert await self.unary("Echo", b"x", timeout=10) == b"x"
        return not self.shapes.running


def ours() -> http2.Server:
    return http2.Server(max_message=MOST)


def grpcio() -> grpc.aio.Server:
    return grpc.aio.server(options=[("grpc.max_receive_message_length", MOST)])


@asynccontextmanager
async def served(made: Callable[[], grpc.aio.Server] = ours) -> AsyncIterator[Served]:
    shapes, server = Shapes(), made()
    server.add_generic_rpc_handlers((shapes.handler(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    told = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=told) as channel:
        yield Served(shapes, server, address, channel)
    await server.stop(0)


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as err:
        return err.code(), err.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("made", [ours, grpcio])
async def test_every_shape_of_call(made: Any) -> None:
    async with served(made) as it:
        assert await it.unary("Echo", b"") == b""
        assert await it.unary("Echo", b"x" * MOST) == b"x" * MOST
        assert [len(m) async for m in it.stream("Words", b"2 20000000")] == [20_000_000] * 2
        assert [m async for m in it.stream("Words", b"3 4")] == [b"wwww"] * 3
        assert [m async for m in it.stream("Words", b"0 0")] == []
        assert [m async for m in it.stream("Words", b"40 70000")] == [b"w" * 70_000] * 40
        assert [m async for m in it.stream("Writes", b"a b")] == [b"a", b"b"]
        parts = [bytes([65 + i % 26]) * 50_000 for i in range(60)]
        assert await it.channel.stream_unary(f"/{SERVICE}/Joined")(iter(parts)) == b" ".join(parts)
        call = it.channel.stream_stream(f"/{SERVICE}/Upper")()
        for word in (b"one", b"two"):
            await call.write(word)
            assert await call.read() == word.upper()
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF


@pytest.mark.parametrize("made", [ours, grpcio])
async def test_metadata_and_statuses_both_ways(made: Any) -> None:
    async with served(made) as it:
        sent = (("plain", "a b"), ("twice", "1"), ("twice", "2"), ("some-bin", bytes(range(256))))
        await it.unary("Echo", b"", metadata=sent, timeout=60)
        seen = [(k, v) for k, v in it.shapes.metadata if k != "user-agent"]
        assert seen == list(sent)
        for number, code in list(enumerate(grpc.StatusCode))[1:]:
            call = it.unary("Told", str(number).encode())
            assert await call.code() == code
            assert await call.details() == "naïve 100 %\n"
            assert dict(await call.initial_metadata()) == {"first": "1", "first-bin": b"\0\xff"}
            assert dict(await call.trailing_metadata()) == {"last": "2", "last-bin": b"\1"}


@pytest.mark.parametrize("made", [http2.Server, grpc.aio.server])
async def test_health_can_be_watched_until_the_stop(made: Any) -> None:
    listen, states = f"127.0.0.1:{INFERENCE + free_offset()}", []
    server = made(interceptors=server_stack(NoOpTracer(), 10))
    async with grpc.aio.insecure_channel(listen) as channel:
        async with serving(server, listen, [SERVICE], grace_s=0.2):
            call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            states.append((await call.read()).status)
        states.append((await call.read()).status)
    assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_what_fails_inside_is_not_told() -> None:
    async with served() as it:
        assert await status(it.unary("Boom", b"")) == (grpc.StatusCode.UNKNOWN, "unexpected ValueError")
        code, _ = await status(it.unary("None", b""))
        assert code == grpc.StatusCode.UNIMPLEMENTED
        assert await it.well()


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_requests_may_be_compressed(compression: Any) -> None:
    async with served() as it:
        text = b"again and " * 10_000
        assert await it.unary("Echo", text, compression=compression) == text


async def test_a_message_is_no_larger_than_allowed_inflated_or_not() -> None:
    async with served() as it:
        code, details = await status(it.unary("Echo", b"x" * (MOST + 1)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED, details
        code, details = await status(it.unary("Echo", b"x" * (MOST + 1), compression=grpc.Compression.Gzip))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED, details
        assert await it.well()


async def test_a_deadline_ends_what_forgets_it() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        headers = (*HEADERS[:2], (":path", f"/{SERVICE}/Hang"), *HEADERS[3:], ("grpc-timeout", "50m"))
        await connection.send(request(1, raw.message(b"x"), headers))
        end = await connection.of(1, raw.HEADERS)  # from the server, not from a client's own clock
        assert end is not None
        assert b"4" in decoded(end.payload)
        await until(it.well, "the handler has ended")
        await connection.close()


async def test_who_leaves_ends_the_handler() -> None:
    async with served() as it:
        call = it.unary("Hang", b"")
        await until(lambda: it.shapes.running == 1, "it runs")
        call.cancel()
        await until(lambda: it.shapes.running == 0, "cancelled")
        connection = await raw.Connection.open(it.address)
        headers = (*HEADERS[:2], (":path", f"/{SERVICE}/Hang"), *HEADERS[3:])
        await connection.send(b"".join(request(stream, raw.message(b"x"), headers) for stream in (1, 3, 5)))
        await until(lambda: it.shapes.running == 3, "they run")
        await connection.send(raw.frame(raw.RST_STREAM, 0, 3, struct.pack(">I", 8)))
        await until(lambda: it.shapes.running == 2, "one was reset")
        await connection.close()
        await until(it.well, "the others went with their connection")


async def test_a_slow_reader_is_waited_for_and_holds_up_nobody() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address, window=100)
        headers = (*HEADERS[:2], (":path", f"/{SERVICE}/Words"), *HEADERS[3:])
        await connection.send(request(1, raw.message(b"50 45"), headers))  # 50 bytes each
        await until(lambda: it.shapes.written == 2, "as much as there is room for")
        assert [m async for m in it.stream("Words", b"3 4")] == [b"wwww"] * 3
        await connection.send(request(3, raw.message(b"1 45"), headers))
        assert await connection.of(3, raw.DATA) is not None
        assert it.shapes.written == 6
        grant = struct.pack(">I", 10_000)
        await connection.send(raw.frame(raw.WINDOW_UPDATE, 0, 1, grant))
        await until(lambda: it.shapes.written == 54, "all of it")
        whole = b"".join(f.payload for f in connection.frames if f.kind == raw.DATA and f.stream == 1)
        assert whole == raw.message(b"w" * 45) * 50
        await connection.close()
        await until(it.well, "nothing is left")


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    """It asks for acknowledgements without end, and takes none."""
    async with served() as it:
        greedy = socket.socket()
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect(("127.0.0.1", int(it.address.rpartition(":")[2])))
        greedy.setblocking(False)
        _, writer = await asyncio.open_connection(sock=greedy)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(raw.PREFACE + raw.frame(raw.SETTINGS, 0, 0))
        pings = raw.frame(raw.PING, 0, 0, b"12345678") * 10_000

        async def ask() -> None:
            for _ in range(1_000):
                writer.write(pings)
                await writer.drain()

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(ask(), 30)
        writer.transport.abort()
        assert await it.well()


async def test_two_thousand_calls_at_once_on_one_connection() -> None:
    async with served() as it:
        calls = [it.unary("Held", str(i).encode()) for i in range(2_000)]
        await until(lambda: it.shapes.running == 2_000, "all run")
        it.shapes.let_go.set()
        assert [int(await call) for call in calls] == list(range(2_000))


async def test_a_stop_lets_calls_end_and_begins_no_new_ones() -> None:
    async with served() as it:
        held = it.unary("Held", b"x")
        await until(lambda: it.shapes.running == 1, "it runs")
        stopping = asyncio.create_task(it.server.stop(10))
        await until(lambda: _refused(it), "nobody is let in any more")
        it.shapes.let_go.set()
        assert await held == b"x"
        async with asyncio.timeout(5):
            await stopping


async def test_no_call_is_lost_to_a_stop() -> None:
    """Callers that never pause: each call is answered, or never began."""
    async with served() as it:

        async def calling() -> int:
            for number in itertools.count():
                code, details = await status(it.unary("Echo", b"x"))
                if code != grpc.StatusCode.OK:
                    assert code == grpc.StatusCode.UNAVAILABLE
                    assert "failed to connect" in details.lower(), details
                    return number
            return 0

        callers = [asyncio.create_task(calling()) for _ in range(20)]
        await pause(0.2, "calls are under way")
        await it.server.stop(5)
        assert min(await asyncio.gather(*callers)) > 0


async def test_a_stop_ends_what_takes_longer_than_the_grace() -> None:
    async with served() as it:
        hanging = it.unary("Hang", b"x")
        await until(lambda: it.shapes.running == 1, "it runs")
        await it.server.stop(0.1)
        assert await hanging.code() == grpc.StatusCode.UNAVAILABLE
        assert it.shapes.running == 0


async def _refused(it: Served) -> bool:
    async with grpc.aio.insecure_channel(it.address) as channel:
        code, _ = await status(channel.unary_unary(f"/{SERVICE}/Echo")(b"", timeout=0.5))
    return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def request(stream: int, body: bytes, headers: raw.Headers = HEADERS) -> bytes:
    head = raw.frame(raw.HEADERS, raw.END_HEADERS, stream, raw.block(headers))
    return head + raw.frame(raw.DATA, raw.END_STREAM, stream, body)


def _with(**fields: str) -> tuple[tuple[str, str], ...]:
    changed = {k.strip("_").replace("_", "-"): v for k, v in fields.items()}
    kept = [(k, v) for k, v in HEADERS if k.strip(":") not in changed]
    pseudo = [(f":{k}", v) for k, v in changed.items() if k in ("method", "path", "scheme")]
    plain = [(k, v) for k, v in changed.items() if k not in ("method", "path", "scheme")]
    return (*pseudo, *kept, *plain)


BOMB = gzip.compress(bytes(50 * MOST))
BAD_REQUESTS = {
    "another method": (request(1, b"", _with(method="GET")), b"415"),
    "another type": (request(1, b"", _with(content_type="text/html")), b"415"),
    "no such method": (request(1, raw.message(b""), _with(path="/x")), b"12"),
    "a time-out without a unit": (request(1, raw.message(b""), _with(grpc_timeout="5")), b"13"),
    "an encoding nobody knows": (request(1, raw.message(b""), _with(grpc_encoding="snappy")), b"12"),
    "metadata that is not Base64": (request(1, raw.message(b""), _with(x_bin="?")), b"13"),
    "no message": (request(1, b""), b"13"),
    "two messages": (request(1, raw.message(b"") * 2), b"13"),
    "half a message": (request(1, raw.message(b"abc", length=9)), b"13"),
    "a message of 4 GB": (request(1, raw.message(b"abc", length=2**32 - 1)), b"8"),
    "a flag nobody knows": (request(1, raw.message(b"abc", flags=7)), b"13"),
    "compressed, but how?": (request(1, raw.message(b"abc", flags=1)), b"13"),
    "not what it says": (request(1, raw.message(b"abc", flags=1), _with(grpc_encoding="gzip")), b"13"),
    "half a gzip": (request(1, raw.message(BOMB[:99], flags=1), _with(grpc_encoding="gzip")), b"13"),
    "a bomb": (
        request(1, raw.message(BOMB[:16_000], flags=1), _with(grpc_encoding="gzip")),
        b"8",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_bad_request_has_its_status_and_spoils_nothing(name: str) -> None:
    sent, expected = BAD_REQUESTS[name]
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(sent)
        head = await connection.of(1, raw.HEADERS)
        assert head is not None
        assert head.flags & raw.END_STREAM
        assert expected in decoded(head.payload)
        await connection.send(request(3, raw.message(b"well")))
        answer = await connection.of(3, raw.DATA)
        assert answer is not None
        assert answer.payload == raw.message(b"well")
        await connection.close()
        assert await it.well()


def decoded(block: bytes) -> list[bytes]:
    return [value for _, value in Decoder().decode(block, raw=True)]


BROKEN = {
    "a header that is no text": raw.frame(
        raw.HEADERS, raw.END_HEADERS, 1, raw.block(HEADERS) + b"\0\1x\2\xff\xfe"
    ),
    "data on no stream": raw.frame(raw.DATA, 0, 0, b"x"),
    "headers on an even stream": raw.frame(raw.HEADERS, raw.END_HEADERS, 2, raw.block(HEADERS)),
    "headers that are none": raw.frame(raw.HEADERS, raw.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
    "a frame too large": raw.frame(raw.DATA, 0, 1, b"x" * 20_000),
    "a window of nothing": raw.frame(raw.WINDOW_UPDATE, 0, 0, bytes(4)),
    "a continuation of nothing": raw.frame(raw.CONTINUATION, 0, 1, b""),
    "a promise": raw.frame(raw.PUSH_PROMISE, raw.END_HEADERS, 1, bytes(4)),
    "headers without end": raw.frame(raw.HEADERS, 0, 1, raw.block(HEADERS))
    + raw.frame(raw.CONTINUATION, 0, 1, raw.block([("x", "y" * 10_000)])) * 200,
}


async def test_who_does_not_speak_http2_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.core.http2.connection.GREETING_S", 0.2)
    async with served() as it:
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", raw.PREFACE[:5]):
            reader, writer = await asyncio.open_connection(*it.address.split(":"))
            writer.write(said)
            async with asyncio.timeout(5):
                while await reader.read(1 << 10):
                    pass
            writer.close()
        patient = await raw.Connection.open(it.address)
        await pause(0.4, "a client that has greeted may be silent")
        await patient.send(request(1, raw.message(b"well")))
        assert await patient.of(1, raw.DATA) is not None
        await patient.close()


@pytest.mark.parametrize("name", BROKEN)
async def test_who_breaks_the_protocol_is_hung_up_on(name: str) -> None:
    async with served() as it:
        good = await raw.Connection.open(it.address)
        bad = await raw.Connection.open(it.address)
        await bad.send(BROKEN[name])
        await asyncio.wait_for(bad.closed.wait(), 10)
        await good.send(request(1, raw.message(b"well")))
        assert await good.of(1, raw.DATA) is not None
        await good.close()
        assert await it.well()


frames = st.builds(
    raw.frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.sampled_from([0, 1, 3, 5, 2, 2**31 - 1]),
    st.one_of(
        st.binary(max_size=40),
        st.just(raw.block(HEADERS)),
        st.just(raw.message(b"x")),
        st.binary(min_size=4, max_size=4),
        st.binary(min_size=6, max_size=6),
    ),
)


async def test_fuzzed_frames_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as it:
        loop = asyncio.get_running_loop()

        @given(st.lists(frames, max_size=12))
        def fuzz(sent: list[bytes]) -> None:
            asyncio.run_coroutine_threadsafe(throw(b"".join(sent)), loop).result(20)

        async def throw(sent: bytes) -> None:
            _, writer = await asyncio.open_connection(*it.address.split(":"))
            writer.write(raw.PREFACE + raw.frame(raw.SETTINGS, 0, 0) + sent)
            writer.close()

        await asyncio.to_thread(fuzz)
        await until(it.well, "nothing of it runs")
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@given(
    st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=20), st.sampled_from(["gzip", "deflate"])
)
def test_messages_are_put_together_however_they_are_cut(text: bytes, cuts: list[int], encoding: str) -> None:
    packed = gzip.compress(text) if encoding == "gzip" else zlib.compress(text)
    sent = raw.message(text) + raw.message(packed, flags=1) + raw.message(b"")
    reader, came = Reader(encoding, MOST), []
    for cut in cuts:
        came += reader.push(sent[:cut])
        sent = sent[cut:]
    assert [*came, *reader.push(sent)] == [text, text, b""]
    assert not len(reader)
