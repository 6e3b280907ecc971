"""The gRPC server of the inference service: with frames that no client library sends."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
import struct

import pytest
from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from tests import http2 as raw
from tests.shapes import MOST, SERVICE, served
from tests.waiting import pause, until

ECHO = raw.call(f"/{SERVICE}/Echo")


def request(stream: int, body: bytes, headers: raw.Headers = ECHO) -> bytes:
    return raw.request(stream, body, headers)


def on(method: str, *more: tuple[str, str]) -> raw.Headers:
    return (*raw.call(f"/{SERVICE}/{method}"), *more)


def _with(**fields: str) -> tuple[tuple[str, str], ...]:
    changed = {k.strip("_").replace("_", "-"): v for k, v in fields.items()}
    kept = [(k, v) for k, v in ECHO if k.strip(":") not in changed]
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
    "data on no stream": raw.frame(raw.DATA, 0, 0, b"x"),
    "headers on an even stream": raw.frame(raw.HEADERS, raw.END_HEADERS, 2, raw.block(ECHO)),
    "headers that are none": raw.frame(raw.HEADERS, raw.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
    "a frame too large": raw.frame(raw.DATA, 0, 1, b"x" * 20_000),
    "a window of nothing": raw.frame(raw.WINDOW_UPDATE, 0, 0, bytes(4)),
    "a continuation of nothing": raw.frame(raw.CONTINUATION, 0, 1, b""),
    "a promise": raw.frame(raw.PUSH_PROMISE, raw.END_HEADERS, 1, bytes(4)),
    "a header of 200 KB": raw.frame(raw.HEADERS, 0, 1, raw.block([*ECHO, ("x", "y" * 200_000)])[:16_000])
    + raw.frame(raw.CONTINUATION, 0, 1, b"y" * 16_000) * 11
    + raw.frame(raw.CONTINUATION, raw.END_HEADERS, 1, raw.block([*ECHO, ("x", "y" * 200_000)])[192_000:]),
    "headers without end": raw.frame(raw.HEADERS, 0, 1, raw.block(ECHO))
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


latin = st.characters(max_codepoint=255)
names = st.one_of(
    st.sampled_from(["", ":path", ":status", "te", "grpc-timeout", "x-bin"]), st.text(latin, max_size=5)
)
values = st.text(latin, max_size=5)
frames = st.builds(
    raw.frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.sampled_from([0, 1, 3, 5, 2, 2**31 - 1]),
    st.one_of(
        st.binary(max_size=40),
        st.just(raw.block(ECHO)),
        st.lists(st.tuples(names, values), max_size=4).map(lambda more: raw.block((*ECHO, *more))),
        st.lists(st.tuples(names, values), max_size=4).map(raw.block),
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


async def test_a_deadline_ends_what_forgets_it() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        headers = on("Hang", ("grpc-timeout", "50m"))
        await connection.send(request(1, raw.message(b"x"), headers))
        end = await connection.of(1, raw.HEADERS)  # from the server, not from a client's own clock
        assert end is not None
        assert b"4" in decoded(end.payload)
        await until(it.well, "the handler has ended")
        await connection.close()


async def test_a_slow_reader_is_waited_for_and_holds_up_nobody() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address, window=100)
        headers = on("Words")
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


async def test_calls_end_with_their_stream_and_with_their_connection() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        headers = on("Hang")
        await connection.send(b"".join(request(stream, raw.message(b"x"), headers) for stream in (1, 3, 5)))
        await until(lambda: it.shapes.running == 3, "they run")
        await connection.send(raw.frame(raw.RST_STREAM, 0, 3, struct.pack(">I", 8)))
        await until(lambda: it.shapes.running == 2, "one was reset")
        await connection.close()
        await until(it.well, "the others went with their connection")


FOREIGN = {
    "a space before": on("Echo", ("x", " v")),
    "a tab behind": on("Echo", ("x", "v\t")),
    "no text": on("Echo", ("x", "\xff\xfe")),
    "a byte that is no text": on("Echo", ("x", "a\x01b")),
    "a name that is none": on("Echo", ("X y", "v")),
    "Base64 with letters of its own": on("Echo", ("x-bin", "\xc3\xa9")),
    "a header of HTTP/1.1": on("Echo", ("connection", "close")),
    "another transfer encoding": (*ECHO[:4], ("te", "gzip"), *ECHO[5:]),
    "headers a little too large": on("Echo", *((f"x-{i}", "v" * 3_000) for i in range(25))),
    "no path": (*ECHO[:2], *ECHO[3:]),
    "no name": on("Echo", ("", "v")),
    "two lengths": on("Echo", ("content-length", "6"), ("content-length", "6")),
    "a deadline in ten thousand years": on("Echo", ("grpc-timeout", "99999999H")),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_headers_of_one_call_are_not_the_end_of_others(name: str) -> None:
    """A proxy has the calls of all of its clients in one connection, and passes on what they say."""
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(request(1, raw.message(b"x"), on("Held")))
        block = raw.block(FOREIGN[name])
        parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
        head = raw.frame(raw.HEADERS, raw.END_HEADERS if len(parts) == 1 else 0, 3, parts[0])
        for part in parts[1:]:
            head += raw.frame(raw.CONTINUATION, raw.END_HEADERS if part is parts[-1] else 0, 3, part)
        await connection.send(head + raw.frame(raw.DATA, raw.END_STREAM, 3, raw.message(b"y")))
        assert await connection.of(3, raw.HEADERS) is not None
        it.shapes.let_go.set()
        answer = await connection.of(1, raw.DATA)
        assert answer is not None
        assert answer.payload == raw.message(b"x")
        await connection.close()


LATE = {
    "data": raw.frame(raw.DATA, 0, 3, b"late"),
    "headers": raw.frame(raw.HEADERS, raw.END_HEADERS | raw.END_STREAM, 3, raw.block([("x", "y")])),
    "nothing": raw.frame(raw.DATA, raw.END_STREAM, 3, b""),
}


@pytest.mark.parametrize("name", LATE)
async def test_what_comes_after_the_end_of_a_request_ends_its_call_only(name: str) -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(b"".join(request(stream, raw.message(b"x"), on("Held")) for stream in (1, 3)))
        await until(lambda: it.shapes.running == 2, "they run")
        await connection.send(LATE[name])
        end = await connection.of(3, raw.RST_STREAM)
        assert end is not None
        assert end.payload == struct.pack(">I", 5)  # STREAM_CLOSED
        it.shapes.let_go.set()
        assert await connection.of(1, raw.DATA) is not None
        await connection.close()
        await until(it.well, "nothing is left")


async def test_trailers_of_a_client_end_its_request() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        head = raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(ECHO))
        ends = raw.frame(raw.HEADERS, raw.END_HEADERS | raw.END_STREAM, 1, raw.block([("x", "y")]))
        await connection.send(head + raw.frame(raw.DATA, 0, 1, raw.message(b"x")) + ends)
        answer = await connection.of(1, raw.DATA)
        assert answer is not None
        assert answer.payload == raw.message(b"x")
        await connection.close()


async def test_an_answer_may_come_before_the_end_of_the_request() -> None:
    """And the rest of it is not waited for."""
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        head = raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(on("Told")))
        await connection.send(head + raw.frame(raw.DATA, 0, 1, raw.message(b"x", flags=9)))
        end = await connection.of(1, raw.RST_STREAM)
        assert end is not None
        assert end.payload == bytes(4)  # NO_ERROR
        assert [f.kind for f in connection.frames if f.stream == 1] == [raw.HEADERS, raw.RST_STREAM]
        await connection.send(raw.frame(raw.DATA, raw.END_STREAM, 1, b"rest") + request(3, raw.message(b"y")))
        assert await connection.of(3, raw.DATA) is not None
        await connection.close()


async def test_who_leaves_before_it_is_refused_leaves_the_others_alone() -> None:
    """The end has come, when what came before it is looked at."""
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(request(1, raw.message(b"x"), on("Held")))
        reset = struct.pack(">I", 8)
        out = b""
        for number, name in enumerate(BAD_REQUESTS):
            stream = 3 + 2 * number
            out += raw.of_stream(BAD_REQUESTS[name][0], stream) + raw.frame(raw.RST_STREAM, 0, stream, reset)
        await connection.send(out)
        it.shapes.let_go.set()
        assert await connection.of(1, raw.DATA) is not None
        await connection.close()


async def test_calls_go_on_when_their_client_says_goaway() -> None:
    """It will begin no more; Java's says so when a channel is shut down, and waits for what it has begun."""
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(request(1, raw.message(b"x"), on("Held")))
        await until(lambda: it.shapes.running == 1, "it runs")
        await connection.send(raw.frame(raw.GOAWAY, 0, 0, bytes(8)) + raw.frame(raw.PING, 0, 0, b"12345678"))
        assert await connection.of(0, raw.PING) is not None
        it.shapes.let_go.set()
        assert await connection.of(1, raw.DATA) is not None
        await asyncio.wait_for(connection.closed.wait(), 5)
        assert connection.frames[-1].flags & raw.END_STREAM


async def test_an_answer_to_no_ping_means_nothing() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(raw.frame(raw.PING, raw.ACK, 0, b"draining") + request(1, raw.message(b"x")))
        assert await connection.of(1, raw.DATA) is not None
        assert not [f for f in connection.frames if f.kind == raw.GOAWAY]
        await connection.close()


LOST = {
    "a message too large": request(1, raw.message(b"x" * 16_000, length=1 << 30)),
    "requests that nobody reads": request(1, raw.message(b"x" * 16_000), on("Upper", ("grpc-timeout", "0n")))
    + raw.frame(raw.RST_STREAM, 0, 1, struct.pack(">I", 8)),
    "requests that come before they are read": request(1, raw.message(b"x" * 8_000) * 2, on("Joined")),
    "padding": raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(ECHO))
    + raw.frame(raw.DATA, 8, 1, b"\xff" + raw.message(b"x" * 15_000) + bytes(255))
    + raw.frame(raw.DATA, raw.END_STREAM, 1, b""),
}


@pytest.mark.parametrize("name", LOST)
async def test_what_a_call_took_of_the_connections_window_is_given_back(name: str) -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address, window=1 << 20)
        await connection.send(raw.frame(raw.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30)))
        granted = lambda: sum(  # noqa: E731
            int.from_bytes(f.payload, "big")
            for f in connection.frames
            if f.kind == raw.WINDOW_UPDATE and f.stream == 0
        )
        for number in range(1_200):  # more than the 16 MiB of the window
            most = 16_100 * (number + 1)
            await until(lambda: granted() + 65_535 >= most, "there is room again", 5, every_s=0.001)  # noqa: B023
            await connection.send(raw.of_stream(LOST[name], 1 + 2 * number))
        await connection.send(request(9_999, raw.message(b"well")))
        answer = await connection.of(9_999, raw.DATA)
        assert answer is not None
        await connection.close()


async def test_streams_share_a_window_that_is_too_small_for_them() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address, window=1 << 20)
        for stream in (1, 3, 5):
            await connection.send(request(stream, raw.message(b"3 400000"), on("Words")))

        def came(stream: int) -> int:
            return sum(len(f.payload) for f in connection.frames if f.kind == raw.DATA and f.stream == stream)

        await until(lambda: sum(map(came, (1, 3, 5))) == 65_535, "as much as there is room for")
        for _ in range(20):
            before = sum(map(came, (1, 3, 5)))
            await connection.send(raw.frame(raw.WINDOW_UPDATE, 0, 0, struct.pack(">I", 16_384)))
            await until(lambda: sum(map(came, (1, 3, 5))) == before + 16_384, "so much more", every_s=0.001)  # noqa: B023
        assert min(map(came, (1, 3, 5))) >= 6 * 16_384
        await connection.close()
        await until(it.well, "nothing is left")


async def test_windows_and_tables_may_shrink_while_a_response_goes_on() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address, window=1_000)
        await connection.send(request(1, raw.message(b"3 995"), on("Words")))
        assert await connection.of(1, raw.DATA) is not None
        table, window, size = 0x1, raw.INITIAL_WINDOW_SIZE, 0x5
        changed = struct.pack(">HIHIHI", table, 0, window, 100, size, 32_768)
        await connection.send(raw.frame(raw.SETTINGS, 0, 0, changed))  # its window is less than nothing now
        await connection.send(raw.frame(raw.WINDOW_UPDATE, 0, 1, struct.pack(">I", 900)))
        await connection.send(request(3, raw.message(b"1 10"), on("Words")))
        assert await connection.of(3, raw.DATA) is not None
        assert it.shapes.written == 2
        await connection.send(raw.frame(raw.WINDOW_UPDATE, 0, 1, struct.pack(">I", 2_000)))
        await until(
            lambda: connection.frames[-1].stream == 1 and connection.frames[-1].kind == raw.HEADERS, "all"
        )
        decoder = Decoder()
        decoder.max_allowed_table_size = 0
        for each in connection.frames:
            if each.kind == raw.HEADERS:
                assert decoder.decode(each.payload)
        assert sum(len(f.payload) for f in connection.frames if f.kind == raw.DATA and f.stream == 1) == 3_000
        await connection.close()


FLOODS = {
    "resets": raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(ECHO))
    + raw.frame(raw.RST_STREAM, 0, 1, struct.pack(">I", 8)),
    "resets of what is refused": raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(on("None")))
    + raw.frame(raw.RST_STREAM, 0, 1, struct.pack(">I", 8)),
    "resets of its own making": raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(ECHO))
    + raw.frame(raw.WINDOW_UPDATE, 0, 1, struct.pack(">I", (1 << 31) - 1)),
    "settings": raw.frame(raw.SETTINGS, 0, 0),
    "pings": raw.frame(raw.PING, 0, 0, bytes(8)),
    "priorities": raw.frame(raw.PRIORITY, 0, 1, bytes(5)),
    "frames nobody knows": raw.frame(0x42, 0, 1, bytes(5)),
}


async def test_a_client_may_measure_the_way_with_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.core.http2.connection.IDLE_FRAMES", 50)
    monkeypatch.setattr("services.core.http2.connection.IDLE_FRAMES_PER_S", 0)
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        for number in range(200):
            await connection.send(
                request(1 + 2 * number, raw.message(b"x")) + raw.frame(raw.PING, 0, 0, bytes(8))
            )
            assert await connection.of(1 + 2 * number, raw.DATA) is not None
        await connection.close()


@pytest.mark.parametrize("name", FLOODS)
async def test_who_asks_for_nothing_again_and_again_is_hung_up_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.core.http2.connection.IDLE_FRAMES", 200)
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        part = FLOODS[name]
        await connection.send(
            b"".join(
                raw.of_stream(part, 1 + 2 * i) if name.startswith("resets") else part for i in range(2_000)
            )
        )
        await asyncio.wait_for(connection.closed.wait(), 10)
        end = await connection.of(0, raw.GOAWAY)  # None: what it still sent came to a closed door
        assert end is None or end.payload[4:8] == struct.pack(">I", 11)  # ENHANCE_YOUR_CALM
        assert await it.well()


async def test_who_breaks_the_protocol_and_reads_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.core.http2.connection.CLOSE_S", 0.2)
    async with served() as it:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(it.address.rpartition(":")[2])))
        deaf.setblocking(False)
        _, writer = await asyncio.open_connection(sock=deaf)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        window = struct.pack(">HI", raw.INITIAL_WINDOW_SIZE, (1 << 31) - 1)
        writer.write(raw.PREFACE + raw.frame(raw.SETTINGS, 0, 0, window))
        writer.write(raw.frame(raw.WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 65_536)))
        writer.write(request(1, raw.message(b"1 50000000"), on("Words")))
        await until(lambda: it.shapes.running == 1, "it writes")
        writer.write(raw.frame(raw.CONTINUATION, 0, 1, b""))
        await until(lambda: it.shapes.running == 0, "it ended")
        closing = asyncio.create_task(it.server.stop(0.1))
        async with asyncio.timeout(5):
            await closing
        writer.transport.abort()


async def test_a_stop_says_once_what_is_answered() -> None:
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(request(1, raw.message(b"x"), on("Held")))
        await until(lambda: it.shapes.running == 1, "it runs")
        stopping = [asyncio.create_task(it.server.stop(10))]
        ping = await connection.of(0, raw.PING)
        assert ping is not None
        await connection.send(request(3, raw.message(b"y"), on("Held")))  # it has not heard of it
        await connection.send(raw.frame(raw.PING, raw.ACK, 0, ping.payload))
        await until(lambda: len([f for f in connection.frames if f.kind == raw.GOAWAY]) == 2, "it is told")
        stopping.append(asyncio.create_task(it.server.stop(10)))
        await connection.send(request(5, raw.message(b"z"), on("Held")))
        refused = await connection.of(5, raw.RST_STREAM)
        assert refused is not None
        assert refused.payload == struct.pack(">I", 7)  # REFUSED_STREAM: safe to be sent again
        it.shapes.let_go.set()
        await asyncio.gather(*stopping)
        assert await connection.of(1, raw.DATA) is not None
        assert await connection.of(3, raw.DATA) is not None
        told = [f.payload[:4] for f in connection.frames if f.kind == raw.GOAWAY]
        assert told == [struct.pack(">I", (1 << 31) - 1), struct.pack(">I", 3)]


async def test_a_stop_without_grace_answers_what_began_and_refuses_what_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.core.http2.server.CANCEL_S", 0.5)
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        await connection.send(request(1, raw.message(b"x"), on("Deaf")))
        await until(lambda: it.shapes.running == 1, "it runs")
        stopping = asyncio.create_task(it.server.stop(0))
        end = await connection.of(1, raw.HEADERS)
        assert end is not None
        assert b"14" in decoded(end.payload)
        await connection.send(request(3, raw.message(b"y")))
        refused = await connection.of(3, raw.RST_STREAM, raw.HEADERS)
        assert refused is None or refused.payload == struct.pack(">I", 7)  # or it is closed already
        it.shapes.let_go.set()
        await stopping


async def test_requests_that_were_read_are_not_held_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """And small ones are not free."""
    monkeypatch.setattr("services.core.http2.server.MAX_HELD_BYTES", 1 << 20)
    async with served() as it:
        calls = [it.channel.stream_stream(f"/{SERVICE}/Upper")() for _ in range(4)]
        for call in calls:
            await call.write(b"x" * 500_000)
            assert len(await call.read()) == 500_000
        assert await it.unary("Echo", b"y" * 500_000) == b"y" * 500_000
        connection = await raw.Connection.open(it.address)
        await connection.send(raw.frame(raw.HEADERS, raw.END_HEADERS, 1, raw.block(on("Never"))))
        await connection.send(raw.frame(raw.DATA, 0, 1, raw.message(b"") * 3_000) * 10)
        end = await connection.of(1, raw.HEADERS)
        assert end is not None
        assert b"8" in decoded(end.payload)
        await connection.close()
        for call in calls:
            call.cancel()
