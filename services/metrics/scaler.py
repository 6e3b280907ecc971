"""KEDA's external scaler (`externalscaler.ExternalScaler`); capacity/scaling.py decides."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from lingqu.metrics.keda import externalscaler_pb2 as pb
from lingqu.metrics.keda.externalscaler_pb2_grpc import ExternalScalerServicer
from services.core.errors import InvalidInput, LingquError, QueueFull
from services.core.interceptors import Context
from services.metrics.capacity import scaling
from services.metrics.store import Store

log = logging.getLogger(__name__)
SERVICE = "externalscaler.ExternalScaler"
LOOK_S = 2.0
MAX_STREAMS = 256

T = TypeVar("T")


class Ask(Protocol):
    """Runs a question to the store where it holds up nobody."""

    async def __call__(self, question: Callable[[], T]) -> T: ...


class Scaler(ExternalScalerServicer):
    def __init__(self, store: Store, ask: Ask, look_s: float = LOOK_S) -> None:
        self._store, self._run, self._look_s = store, ask, look_s
        self._streams = 0

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:
        asked = scaling.trigger(request.scalerMetadata)
        return pb.IsActiveResponse(result=await self._active(asked))

    async def StreamIsActive(
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.IsActiveResponse]:
        """While the store is away nothing is said: what was said last holds."""
        asked = scaling.trigger(request.scalerMetadata)
        if self._streams >= MAX_STREAMS:
            raise QueueFull(f"{MAX_STREAMS} triggers are watched already")
        self._streams += 1
        said: bool | None = None
        try:
            while True:
                try:
                    active = await self._active(asked)
                except LingquError as err:
                    log.warning("whether %s is active cannot be told: %s", asked.model, err)
                else:
                    if active != said:
                        yield pb.IsActiveResponse(result=active)
                    said = active
                await asyncio.sleep(self._look_s)
        finally:
            self._streams -= 1

    async def GetMetricSpec(self, request: pb.ScaledObjectRef, context: Context) -> pb.GetMetricSpecResponse:
        asked = scaling.trigger(request.scalerMetadata)
        spec = pb.MetricSpec(
            metricName=asked.name, targetSize=math.ceil(asked.target), targetSizeFloat=asked.target
        )
        return pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        asked = scaling.trigger(request.scaledObjectRef.scalerMetadata)
        if request.metricName not in ("", asked.name):
            raise InvalidInput("metricName", f'is "{asked.name}" by the metadata, not "{request.metricName}"')
        found = await self._run(lambda: scaling.value(self._store, asked, time.time_ns()))
        value = pb.MetricValue(metricName=asked.name, metricValue=math.ceil(found), metricValueFloat=found)
        return pb.GetMetricsResponse(metricValues=[value])

    async def _active(self, asked: scaling.Trigger) -> bool:
        return await self._run(lambda: scaling.is_active(self._store, asked, time.time_ns()))
