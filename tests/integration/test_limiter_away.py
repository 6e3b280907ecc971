"""A real Envoy whose limiters are gone, or do not answer: another one is asked at once, and where there is
none a request does not wait in vain."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc

from services.core.access import Access, Client, Limits
from services.gateway.listener import Limiting
from tests.dataplane import DataPlane, FakeReplica, dataplane, model, replicas

TIMEOUT_S = 0.5
LIMITED = Access((Client("tester", ("*",), Limits(requests_per_second=1000)),))


class Limiter(rls_pb2_grpc.RateLimitServiceServicer):  # type: ignore[misc]
    """Says yes; what is `asked` while it is `silent` it never answers."""

    def __init__(self) -> None:
        self.asked = 0
        self.silent = False

    async def ShouldRateLimit(self, request: Any, context: Any) -> Any:
        self.asked += 1
        if self.silent:
            await asyncio.Event().wait()
        return rls_pb2.RateLimitResponse(overall_code=rls_pb2.RateLimitResponse.OK)


@asynccontextmanager
async def serving(limiter: Limiter) -> AsyncIterator[str]:
    server = grpc.aio.server()
    rls_pb2_grpc.add_RateLimitServiceServicer_to_server(limiter, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@asynccontextmanager
async def refusing() -> AsyncIterator[str]:
    """Where nobody listens, for as long as it lasts."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(scope="module")
async def plane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[DataPlane, FakeReplica]]:
    """Undecided requests are refused."""
    limits = Limiting(TIMEOUT_S, closed=True)
    async with dataplane(tmp_path_factory.mktemp("plane"), limits=limits) as made, replicas("a") as [one]:
        yield made, one


async def ask(plane: tuple[DataPlane, FakeReplica], limiters: Iterable[str], times: int) -> list[str]:
    """The statuses of requests one after the other."""
    made, one = plane
    await made.publish([one.hosting(("m", 1))], [model("m", {1: 100})], access=LIMITED, limiters=limiters)
    found = []
    for _ in range(times):
        try:
            await made.generate("m")
            found.append("OK")
        except grpc.aio.AioRpcError as err:
            found.append(err.code().name)
    return found


async def test_when_one_limiter_is_gone_another_is_asked_in_time(
    plane: tuple[DataPlane, FakeReplica],
) -> None:
    limiter = Limiter()
    async with AsyncExitStack() as stack:
        there = [await stack.enter_async_context(serving(limiter))]
        gone = [await stack.enter_async_context(refusing()) for _ in range(2)]
        assert Counter(await ask(plane, [*gone, *there], 20)) == {"OK": 20}
    assert limiter.asked == 20


async def test_when_all_are_gone_nobody_waits_for_the_timeout(plane: tuple[DataPlane, FakeReplica]) -> None:
    async with refusing() as one, refusing() as other:
        begun = time.monotonic()
        assert Counter(await ask(plane, [one, other], 10)) == {"UNAVAILABLE": 10}
        assert time.monotonic() - begun < 10 * TIMEOUT_S / 2


async def test_one_that_says_nothing_is_waited_for_as_long_as_was_set_and_then_left(
    plane: tuple[DataPlane, FakeReplica],
) -> None:
    silent, limiter = Limiter(), Limiter()
    silent.silent = True
    async with serving(silent) as one, serving(limiter) as other:
        begun = time.monotonic()
        codes = Counter(await ask(plane, [one, other], 20))
        assert codes["OK"] >= 15
        assert time.monotonic() - begun < 20 * TIMEOUT_S / 2
        assert silent.asked <= 5
