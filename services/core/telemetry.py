"""Tracing and metering set-up. No global instrumentors: spans and figures are made where the code says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import metrics, trace
from opentelemetry.propagate import inject

from services.core.tls import Identity


@contextmanager
def tracing(service: str, otlp_endpoint: str) -> Iterator[trace.Tracer]:
    """A tracer that exports by OTLP/gRPC to `otlp_endpoint` ("host:port"), or, if that is empty, one that
    records nothing but still carries the caller's trace context on."""
    if not otlp_endpoint:
        yield trace.NoOpTracerProvider().get_tracer(service)
        return
    # Imported here: the exporter costs a third of a second at start.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=True)
    # The queue is bounded: when the collector is away, spans are dropped, never requests.
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=4096, schedule_delay_millis=500))
    try:
        yield provider.get_tracer(service)
    finally:
        provider.shutdown()


@contextmanager
def metering(
    service: str,
    otlp_endpoint: str,
    identity: Identity | None = None,
    instance: str = "",
    every_s: float = 5.0,
) -> Iterator[metrics.Meter]:
    """A meter that exports by OTLP/gRPC to `otlp_endpoint` ("host:port"), or, if that is empty, one that
    measures nothing. `identity`: who this part is there. `instance` tells processes of a service apart.
    Raises OSError if the identity cannot be read."""
    if not otlp_endpoint:
        yield metrics.NoOpMeterProvider().get_meter(service)
        return
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    from services.core import exporter as exporters

    exporter = exporters.to(otlp_endpoint, identity)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=every_s * 1000)
    resource = Resource.create({"service.name": service, "service.instance.id": instance})
    provider = MeterProvider([reader], resource)
    try:
        yield provider.get_meter(service)
    finally:
        provider.shutdown(timeout_millis=2_000)


def current_traceparent() -> str:
    """The active context as a W3C `traceparent`, or an empty string when there is none."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return carrier.get("traceparent", "")
