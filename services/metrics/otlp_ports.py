"""Where OTLP is taken: on the ports that answer everything else as well, and, where those ask for
certificates, on some for senders that have none. These are plain, for this machine only, and answer nothing
else: whoever reaches them may tell figures, but read none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from services.core.interceptors import server_stack
from services.core.lifecycle import SERVER_OPTIONS, serving
from services.inference.rest.connection import Patience
from services.inference.rest.server import serving_http
from services.metrics import receivers
from services.metrics.http import otlp_app
from services.metrics.intake import Intake

MAX_EXPORT_BYTES = 16 << 20
OPTIONS: list[tuple[str, Any]] = list(
    (dict(SERVER_OPTIONS) | {"grpc.max_receive_message_length": MAX_EXPORT_BYTES}).items()
)
# Exports in progress are few (http.py): who takes long over one keeps others out.
PATIENCE = Patience(body=20.0)
SERVICES = (
    receivers.METRICS,
    "opentelemetry.proto.collector.trace.v1.TraceService",
    "opentelemetry.proto.collector.logs.v1.LogsService",
)


def add_otlp(intake: Intake, server: grpc.aio.Server) -> None:
    receivers.add_metrics(receivers.Metrics(intake), server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receivers.Traces(intake), server)
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(receivers.Logs(intake), server)


@asynccontextmanager
async def serving_plain(
    intake: Intake, grpc_listen: str, http_listen: str, grace_s: float, max_in_flight: int
) -> AsyncIterator[None]:
    """Either may be empty: it is not there then. Raises OSError if one is taken."""
    async with AsyncExitStack() as stack:
        if grpc_listen:
            tracer = trace.NoOpTracerProvider().get_tracer("lingqu-metrics")
            server = grpc.aio.server(interceptors=server_stack(tracer, max_in_flight), options=OPTIONS)
            add_otlp(intake, server)
            await stack.enter_async_context(serving(server, grpc_listen, SERVICES, grace_s))
        if http_listen:
            await stack.enter_async_context(
                serving_http(otlp_app(intake), http_listen, grace_s, patience=PATIENCE)
            )
        yield
