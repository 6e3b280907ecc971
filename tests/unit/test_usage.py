"""What clients have used is told to the limiter: all of it, once, whoever listens and whenever."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lingqu.gateway.v1 import limiter_pb2 as pb
from lingqu.gateway.v1.limiter_pb2_grpc import LimiterServiceServicer, add_LimiterServiceServicer_to_server
from services.core.discovery import VersionKey
from services.inference import usage
from services.inference.admission import Admission
from services.inference.callers import Caller
from services.inference.figures import Figures
from services.inference.usage import UsageReports
from tests.waiting import pause, until


class Limiter(LimiterServiceServicer):
    """Charges each report once. `fails`: so many reports are not answered well, though they are on record."""

    def __init__(self) -> None:
        self.charged: Counter[tuple[str, str]] = Counter()
        self.fails = 0
        self._seen: dict[str, int] = {}

    async def ReportUsage(self, request: pb.ReportUsageRequest, context: Any) -> pb.ReportUsageResponse:
        if request.sequence > self._seen.get(request.reporter, 0):
            self._seen[request.reporter] = request.sequence
            self.charged.update({(u.client, u.model): u.tokens for u in request.usages})
        if self.fails:
            self.fails -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return pb.ReportUsageResponse()


@pytest.fixture
async def listening() -> AsyncIterator[tuple[Limiter, str]]:
    limiter, server = Limiter(), grpc.aio.server()
    add_LimiterServiceServicer_to_server(limiter, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield limiter, f"127.0.0.1:{port}"
    await server.stop(0)


async def test_everything_is_told_once_however_often_it_takes(listening: tuple[Limiter, str]) -> None:
    limiter, address = listening
    there: list[str] = []
    reports = UsageReports(lambda: there)
    async with reports.running():
        for _ in range(10):
            reports.charge("alice", "m", 3)
        await pause(2 * usage.EVERY_S, "it is told again and again, and nobody listens")
        limiter.fails = 1
        there[:] = [address, "127.0.0.1:1"]
        reports.charge("bob", "m", 5)
        await until(lambda: limiter.charged == {("alice", "m"): 30, ("bob", "m"): 5}, "all is charged")
        reports.charge("alice", "m", 1)
    assert limiter.charged["alice", "m"] == 31, "a stop tells the rest"
    assert not reports.dropped


async def test_what_cannot_be_kept_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_KEPT", 2)
    reports = UsageReports(list)
    for client in ("a", "b", "c", "a", ""):
        reports.charge(client, "m", 7)
    assert reports.dropped == 7


async def test_whoever_asks_is_charged_what_was_read_for_it_also_if_it_fails() -> None:
    charged: list[tuple[str, str, int]] = []
    admission = Admission(4, 4, Figures(charge=lambda *used: charged.append(used)))

    async def fail() -> None:
        async with admission.request(VersionKey("m", 1), Caller("alice")) as asked:
            asked.prompt_tokens = 12
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await fail()
    assert charged == [("alice", "m", 12)]
