"""Who sends by gRPC: OpenTelemetry's exporters, and Envoy's access log."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from services.core.errors import BackendUnavailable
from services.core.interceptors import Context
from services.metrics import accesslog
from services.metrics.intake import Intake
from services.metrics.otlp import Decoder
from services.metrics.readings import Refusal
from services.metrics.wire import MetricsData
from services.metrics.writer import Receipt

# Senders wait ten seconds by default; after this they are told to send again.
KEPT_WITHIN_S = 5.0
METRICS = "opentelemetry.proto.collector.metrics.v1.MetricsService"


class Exports:
    """Exports of metrics, by whatever protocol."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._decoder = Decoder()

    async def accept(self, request: Any) -> Any:
        """One of them, a `wire.MetricsData`: kept when this returns. Raises BackendUnavailable or QueueFull,
        for the sender to send it again; what was counted then is not counted twice."""
        self._intake.writer.check()
        taken = self._intake.offer(self._decoder.readings(request.resource_metrics))
        await kept(taken.receipt)
        return _answer(taken.refused)


def _answer(refused: Counter[Refusal]) -> Any:
    response = metrics_service_pb2.ExportMetricsServiceResponse()
    if refused:
        response.partial_success.rejected_data_points = refused.total()
        response.partial_success.error_message = _said(refused)
    return response


async def kept(receipt: Receipt) -> None:
    try:
        async with asyncio.timeout(KEPT_WITHIN_S):
            await asyncio.shield(asyncio.wrap_future(receipt))
    except TimeoutError as err:
        raise BackendUnavailable("the store of metrics does not answer; send it again") from err


def _said(refused: Counter[Refusal]) -> str:
    return "; ".join(f"{number} of {_WHY[why]}" for why, number in refused.most_common())


_WHY = {
    Refusal.NAME: "a measurement whose name is empty or malformed",
    Refusal.NUMBER: "values that are no finite numbers",
    Refusal.TIME: "a time that is missing, more than a day ago, or more than five minutes ahead",
    Refusal.ORDER: "a time that is not later than the one before of the series",
    Refusal.SERIES: "counters beyond the number of series that there may be",
    Refusal.MEASUREMENTS: "measurements or fields beyond the number that there may be",
    Refusal.FULL: "what found the queue full",
    Refusal.STORE: "what the store refused",
}


class Metrics:
    def __init__(self, intake: Intake) -> None:
        self._exports = Exports(intake)

    async def Export(self, request: Any, context: Context) -> Any:
        return await self._exports.accept(request)


def add_metrics(metrics: Metrics, server: grpc.aio.Server) -> None:
    """As the generated function does, with messages of our own reading."""
    export = grpc.unary_unary_rpc_method_handler(
        metrics.Export,
        request_deserializer=MetricsData.FromString,
        response_serializer=metrics_service_pb2.ExportMetricsServiceResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METRICS, {"Export": export}),))


def count_spans(intake: Intake, request: Any) -> Any:
    """Nothing keeps them yet: they are counted."""
    spans = sum(len(scope.spans) for found in request.resource_spans for scope in found.scope_spans)
    intake.note("spans", "not kept", spans)
    return trace_service_pb2.ExportTraceServiceResponse()


class Traces(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def Export(self, request: Any, context: Context) -> Any:
        return count_spans(self._intake, request)


class Logs(logs_service_pb2_grpc.LogsServiceServicer):  # type: ignore[misc]
    """Nothing keeps them yet: they are counted."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def Export(self, request: Any, context: Context) -> Any:
        logs = sum(len(scope.log_records) for found in request.resource_logs for scope in found.scope_logs)
        self._intake.note("logs", "not kept", logs)
        return logs_service_pb2.ExportLogsServiceResponse()


class AccessLog(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]
    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def StreamAccessLogs(self, requests: AsyncIterator[Any], context: Context) -> Any:
        """Envoy sends for as long as it lives, and nothing again."""
        async for message in requests:
            if entries := message.http_logs.log_entry:
                self._intake.take(accesslog.readings(entries))
        return als_pb2.StreamAccessLogsResponse()
