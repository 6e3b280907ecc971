"""How figures get to a collector by OTLP/gRPC: to an outside one in the clear, to the metrics service as one
part to another.

OpenTelemetry's exporter reads its certificate once. So there is an exporter behind the exporter: another one
when the files say something else."""

from __future__ import annotations

from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData

from services.core import tls
from services.core.renewal import Renewed
from services.core.tls import Identity

TIMEOUT_S = 2
# Not also UNAVAILABLE: the next export tells the totals as well, and a process that ends behind the metrics
# service would try again for a second.
AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED,)


def to(address: str, identity: Identity | None = None) -> MetricExporter:
    """`address` is "host:port"; with an identity its certificate has to name the host. Raises OSError if the
    identity cannot be read."""
    if identity is None:
        return OTLPMetricExporter(
            endpoint=address, insecure=True, timeout=TIMEOUT_S, retryable_error_codes=AGAIN
        )
    return _Secured(address, identity)


class _Secured(MetricExporter):
    """For one thread."""

    def __init__(self, address: str, identity: Identity) -> None:
        super().__init__()
        self._address, self._identity = address, identity
        self._files = Renewed(self._made, lambda: identity.written)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **given: Any
    ) -> MetricExportResult:
        former = self._files.now
        if self._files.renew():
            former.shutdown()
        return self._files.now.export(metrics_data, timeout_millis, **given)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._files.now.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **given: Any) -> None:
        self._files.now.shutdown(timeout_millis, **given)

    def _made(self) -> OTLPMetricExporter:
        return OTLPMetricExporter(
            endpoint=self._address,
            insecure=False,
            credentials=tls.channel_credentials(self._identity),
            timeout=TIMEOUT_S,
            retryable_error_codes=AGAIN,
        )
