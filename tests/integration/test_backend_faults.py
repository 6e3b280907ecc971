"""Backends that hang, die, refuse, answer garbage or break off, behind a real Envoy: what is retryable does
not fail, what fails does so quickly and says so, and nothing spreads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import httpx2 as httpx
import pytest

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.discovery import Protection, VersionKey
from tests.planes import STREAM, Backend, Plane, hosting, model, plane, raw_server
from tests.waiting import forever, pause, until

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
M = VersionKey("m", 1)


@pytest.fixture(scope="module")
async def gate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    async with plane(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture
async def backends() -> AsyncIterator[list[Backend]]:
    made = [Backend() for _ in range(3)]
    for backend in made:
        await backend.start()
    yield made
    for backend in made:
        await backend.stop()


async def shown(gate: Plane, *addresses: str) -> None:
    replicas = [hosting(f"r{n}", address, M) for n, address in enumerate(addresses)]
    await gate.show(replicas, [model("m", 100, protection=Protection(no_breaker=True))])


async def test_one_of_three_dies_under_load_and_no_request_fails(
    gate: Plane, backends: list[Backend]
) -> None:
    """dynamo #1424."""

    async def work(_: object) -> None:
        await pause(0.01, "so that there are some in progress")

    for backend in backends:
        backend.before = work
    await shown(gate, *(backend.address for backend in backends))
    callers = [await gate.caller(f"c{n}") for n in range(3)]
    served, failed = 0, []

    async def load(number: int) -> None:
        nonlocal served
        while True:
            answer = await callers[number % 3].ask("m")
            served += answer.ok
            failed.extend([] if answer.ok else [answer])

    loading = [asyncio.ensure_future(load(number)) for number in range(60)]
    await until(lambda: served > 200, "the load runs")
    port = int(backends[0].address.rpartition(":")[2])
    await backends[0].stop()
    seen = served
    await until(lambda: served > seen + 500, "it goes on without one")
    await backends[0].start(port)
    asked = backends[0].asked
    await until(lambda: backends[0].asked > asked + 20, "the one that is back is asked again")
    for task in loading:
        task.cancel()
    assert not failed


@pytest.mark.parametrize("others", [0, 2])
async def test_garbage_and_silence(gate: Plane, backends: list[Backend], others: int) -> None:
    """What speaks no HTTP/2 is no answer; with others there, nobody notices."""

    async def garble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\xffgarbage" * 1000)
        await writer.drain()
        writer.close()

    async with raw_server(garble) as garbled:
        await shown(gate, garbled, *(backend.address for backend in backends[:others]))
        answers = await (await gate.caller("c")).ask_often("m", 20)
    if others:
        assert not [answer for answer in answers if not answer.ok]
        return
    for answer in answers:
        assert answer.code is UNAVAILABLE
        assert answer.details["ErrorInfo"].reason == "BACKEND_UNAVAILABLE"
        assert answer.details["RetryInfo"].retry_delay.seconds == 1


async def test_all_are_dead(gate: Plane, backends: list[Backend]) -> None:
    await shown(gate, *(backend.address for backend in backends))
    for backend in backends:
        await backend.stop()
    caller, began = await gate.caller("c"), time.monotonic()
    answers = await caller.ask_often("m", 20)
    assert {answer.code for answer in answers} == {UNAVAILABLE}
    assert all("RetryInfo" in answer.details for answer in answers)
    assert time.monotonic() - began < 5
    await shown(gate)
    assert (await caller.ask("m")).details["ErrorInfo"].reason == "BACKEND_UNAVAILABLE"


async def test_one_that_hangs_costs_its_callers_their_deadline_and_nobody_else(
    gate: Plane, backends: list[Backend]
) -> None:
    async def hang(_: object) -> None:
        await forever()

    backends[0].before = hang
    n = VersionKey("n", 1)
    replicas = [hosting("r0", backends[0].address, M), hosting("r1", backends[1].address, n)]
    await gate.show(replicas, [model("m", 100), model("n", 100)])
    caller = await gate.caller("c")
    hung = [asyncio.ensure_future(caller.ask("m", timeout_s=2)) for _ in range(50)]
    await until(lambda: backends[0].busy == 50, "all are at the backend")
    assert {answer.code for answer in await caller.ask_often("n", 50)} == {OK}
    assert not any(task.done() for task in hung)
    assert {answer.code for answer in await asyncio.gather(*hung)} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    await until(lambda: backends[0].busy == 0, "nothing is computed for those who have left")


async def test_an_answer_that_breaks_off_is_not_begun_again(gate: Plane, backends: list[Backend]) -> None:
    """The caller has part of it already, and is told that it has not got all."""
    came = asyncio.Event()

    async def never(context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.write(pb.GenerateChunk(text="begun").SerializeToString())
        came.set()
        await forever()

    for backend in backends[:2]:
        backend.before = never
    await shown(gate, backends[0].address, backends[1].address)
    caller = await gate.caller("c")
    method = caller.channel.unary_stream(
        STREAM, pb.GenerateRequest.SerializeToString, pb.GenerateChunk.FromString
    )
    request = pb.GenerateRequest(model="m", prompt="x")
    call = method(request, metadata=(("authorization", f"Bearer {caller.key}"),), timeout=10)
    assert (await call.read()).text == "begun"
    await came.wait()
    for backend in backends[:2]:
        await backend.stop()
    with pytest.raises(grpc.aio.AioRpcError) as broken:
        await call.read()
    assert broken.value.code() in (UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert backends[0].asked + backends[1].asked == 1


async def test_no_hidden_cap_of_connections_holds_requests_up(gate: Plane) -> None:
    """production-stack #767: a pool of a hundred. Each of these needs a connection of its own."""
    waiting, number = [], 300
    all_there = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        waiting.append(writer)
        if len(waiting) == number:
            all_there.set()
        await all_there.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with raw_server(answer) as http:
        await gate.show([hosting("r0", http, M, http=http)], [model("m", 100)])
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {gate.keys.mint('c').key}"}
        async with httpx.AsyncClient(
            base_url=f"http://{gate.entry.listen}", headers=headers, limits=limits, trust_env=False
        ) as client:
            asked = (client.post("/v1/completions", json={"model": "m"}, timeout=10) for _ in range(number))
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


async def test_retries_are_no_storm(gate: Plane, backends: list[Backend]) -> None:
    """When everything fails, attempts are bounded by the budget, not five for each request."""

    async def refuse(context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await pause(0.02, "so that many are in progress at once")
        await context.abort(UNAVAILABLE, "not now")

    for backend in backends:
        backend.before = refuse
    await shown(gate, *(backend.address for backend in backends))
    caller = await gate.caller("c")
    answers = await caller.ask_often("m", 300)
    assert {answer.code for answer in answers} == {UNAVAILABLE}
    attempts = sum(backend.asked for backend in backends)
    assert 300 <= attempts < 300 * 3


async def test_a_replica_that_only_fails_is_left_out_but_never_all(
    gate: Plane, backends: list[Backend]
) -> None:
    async def fail(context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.abort(grpc.StatusCode.INTERNAL, "broken")

    backends[0].before = fail
    await shown(gate, *(backend.address for backend in backends))
    caller = await gate.caller("c")

    async def settled() -> bool:
        return {answer.code for answer in await caller.ask_often("m", 60, at_once=False)} == {OK}

    await until(settled, "the replica is left out")
    for backend in backends:
        backend.before = fail
    before = [backend.asked for backend in backends]
    await caller.ask_often("m", 200, at_once=False)
    assert sum(backend.asked > old for backend, old in zip(backends, before, strict=True)) >= 2
