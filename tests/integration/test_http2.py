"""The gRPC server of the inference service, with grpcio's client."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import zlib
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
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
from tests.shapes import MOST, SERVICE, Served, grpcio, ours, served, status
from tests.waiting import pause, until


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
        seen = [(each.key, each.value) for each in it.shapes.metadata if each.key != "user-agent"]
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


@pytest.mark.parametrize("made", [ours, grpcio])
async def test_a_status_may_be_set_and_need_not_be_raised(made: Any) -> None:
    async with served(made) as it:
        for how in (b"return", b"raise", b"abort"):
            call = it.unary("Ends", how)
            code, details = await status(call)
            assert code == grpc.StatusCode.NOT_FOUND, how
            assert details == "nobody here" or how == b"raise"
            assert dict(await call.trailing_metadata()) == {"last": "1"}
        await until(lambda: it.shapes.done == [False] * 3, "callbacks ran, none of a cancelled call")


@pytest.mark.parametrize(
    "metadata", [(("Bad Name", "x"),), (("x", "two\r\nlines"),), (("x", "né"),), (("x", 1),)]
)
async def test_metadata_that_is_none_fails_its_call_only(metadata: Any) -> None:
    async with served() as it:
        for when in (b"first", b"last"):
            it.shapes.metadata = list(metadata)
            assert (await status(it.unary("Metadata", when)))[0] == grpc.StatusCode.UNKNOWN
        assert await it.well()


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


async def test_who_leaves_ends_the_handler() -> None:
    async with served() as it:
        call = it.unary("Hang", b"")
        await until(lambda: it.shapes.running == 1, "it runs")
        call.cancel()
        await until(lambda: it.shapes.running == 0, "cancelled")


async def test_who_does_not_hear_that_it_is_cancelled_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.core.http2.server.CANCEL_S", 0.2)
    async with served() as it:
        connection = await raw.Connection.open(it.address)
        late = (*raw.call(f"/{SERVICE}/Deaf"), ("grpc-timeout", "10m"))
        await connection.send(raw.request(1, raw.message(b"x"), late))
        end = await connection.of(1, raw.HEADERS, timeout_s=5)
        assert end is not None
        assert it.shapes.running == 1, "its deadline is told all the same"
        deaf = it.unary("Deaf", b"x")
        await until(lambda: it.shapes.running == 2, "they run")
        async with asyncio.timeout(5):
            await it.server.stop(0)
        assert await deaf.code() == grpc.StatusCode.UNAVAILABLE
        it.shapes.let_go.set()
        await until(lambda: it.shapes.running == 0, "they ended")
        await connection.close()


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
        before = asyncio.all_tasks()
        await it.server.stop(0.1)
        assert await hanging.code() == grpc.StatusCode.UNAVAILABLE
        assert it.shapes.running == 0
        assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()
        assert not [task for task in before if task.get_name() == "call" and not task.done()]


async def _refused(it: Served) -> bool:
    async with grpc.aio.insecure_channel(it.address) as channel:
        code, _ = await status(channel.unary_unary(f"/{SERVICE}/Echo")(b"", timeout=0.5))
    return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


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
