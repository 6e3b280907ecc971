"""`lingqu.metrics.v1.MetricsService`: what there is, what it was, and what comes in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from lingqu.metrics.v1 import capacity_pb2
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceServicer
from services.core.errors import QueueFull
from services.core.identity import Callers
from services.core.interceptors import Context
from services.metrics import convert
from services.metrics.alerts.engine import Engine
from services.metrics.alerts.service import AlertRpcs
from services.metrics.capacity import advice, figures
from services.metrics.capacity import convert as capacity
from services.metrics.points import Point
from services.metrics.store import Store
from services.metrics.tails import Tails, send

T = TypeVar("T")
THREADS = 2
MAX_WAITING = 64


class Metrics(AlertRpcs, MetricsServiceServicer):
    """Questions wait in threads of their own, so that slow ones are in nobody's way but each other's."""

    def __init__(self, store: Store, followers: Tails[Point], alerts: Engine, callers: Callers) -> None:
        super().__init__(alerts, callers)
        self._store, self._tails = store, followers
        self._threads = ThreadPoolExecutor(THREADS, "metrics-query")
        self._asked = 0

    async def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        query = convert.to_query(request, time.time_ns())
        return convert.to_query_response(await self.ask(lambda: self._store.query(query)))

    async def ListSeries(self, request: pb.ListSeriesRequest, context: Context) -> pb.ListSeriesResponse:
        measurement, limit = convert.to_measurement(request), convert.to_limit(request)
        found = await self.ask(lambda: self._store.series(measurement, limit + 1))
        return convert.to_list_response(found, limit)

    async def Tail(self, request: pb.TailRequest, context: Any) -> AsyncIterator[pb.TailResponse]:
        async with aclosing(self._tails.follow(convert.wanted(request))) as points:
            async for point in points:
                await send(context, convert.to_tail_response(point))
        return
        yield  # a handler that writes to its context by itself still has to be a generator

    async def GetCapacity(
        self, request: capacity_pb2.GetCapacityRequest, context: Context
    ) -> capacity_pb2.GetCapacityResponse:
        asked, window_s = capacity.to_asked(request), capacity.to_window(request)

        def found() -> capacity_pb2.GetCapacityResponse:
            known = figures.measured(self._store, request.model, request.version, window_s, time.time_ns())
            return capacity.to_response(known, advice.advise(known, asked))

        return await self.ask(found)

    async def ask(self, question: Callable[[], T]) -> T:
        """In a thread of its own. Raises QueueFull."""
        if self._asked >= MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} questions wait already; ask again later")
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, question)
        finally:
            self._asked -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
