"""The load reporting service: every Envoy tells once a second what became of the requests to each cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from envoy.service.load_stats.v3 import lrs_pb2, lrs_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from services.core.interceptors import Context
from services.gateway.breakers import Load, VersionId

INTERVAL_S = 1


class Loads(lrs_pb2_grpc.LoadReportingServiceServicer):  # type: ignore[misc]
    """Sums what all connected Envoys report, until somebody takes it."""

    def __init__(self) -> None:
        self._loads: dict[VersionId, Load] = {}

    def take(self) -> dict[VersionId, Load]:
        """What has been reported since the last time."""
        taken, self._loads = self._loads, {}
        return taken

    async def StreamLoadStats(
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        async for request in request_iterator:
            if not request.cluster_stats:
                yield lrs_pb2.LoadStatsResponse(
                    send_all_clusters=True, load_reporting_interval=Duration(seconds=INTERVAL_S)
                )
            for version, load in loads(request.cluster_stats):
                self._loads[version] = self._loads.get(version, Load()) + load


def loads(stats: Iterable[Any]) -> Iterable[tuple[VersionId, Load]]:
    """A version has a cluster for each of its protocols; clusters of no version are left out."""
    for cluster in stats:
        kind, _, rest = cluster.cluster_name.partition("/")
        model, _, number = rest.rpartition("/")
        if kind not in ("text", "tensor", "rest") or not number.isdecimal():
            continue
        seconds = cluster.load_report_interval.ToNanoseconds() / 1e9
        for locality in cluster.upstream_locality_stats:
            failed, running = locality.total_error_requests, locality.total_requests_in_progress
            ended = locality.total_successful_requests + failed
            yield (model, int(number)), Load(ended, failed, running * seconds, running)
