"""Points a second into the metrics service by OTLP/gRPC, acknowledged when kept: `python -m bench.intake`.

DuckDB, and a real InfluxDB 1.x where `influxd` is installed, in turn; the service is a process of its own
each time, as `lingqu up` starts it."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from bench import contestants
from bench.report import Target, judged, row
from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import Options, metrics
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from tests.influxes import influx

PASSES = 3
EXPORTS = 300
POINTS = 1_000  # of an export
SENDERS = 16
OFFSET = 1500
MAX_MIB = 512.0
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


async def measured(store: str, server: int | None, layout: Layout) -> dict[str, float]:
    """Of one process of the service. `server`: the store's own process, if it has one."""
    part = metrics(layout, Options())
    process = await Running.start(replace(part, env={**part.env, "LINGQU_METRICS_STORE": store}), layout.logs)
    try:
        await process.until_ready()
        service = psutil.Process(process.pid)
        watched = [service] + ([psutil.Process(server)] if server else [])
        async with grpc.aio.insecure_channel(layout.address(at.METRICS)) as channel:
            await _sent(channel, 20)
            used, begun = [contestants.cpu_s(one) for one in watched], time.perf_counter()
            await _sent(channel, EXPORTS)
            took = time.perf_counter() - begun
            costs = [contestants.cpu_s(one) - before for one, before in zip(watched, used, strict=True)]
            sum_ = pb.QueryRequest(measurement="bench", aggregate=pb.AGGREGATE_SUM)
            answer: Any = await MetricsServiceStub(channel).Query(sum_, timeout=30)
        kept = sum(sample.value for series in answer.series for sample in series.samples)
        assert kept == (20 + EXPORTS) * POINTS, f"{kept} points were kept"
        number = EXPORTS * POINTS
        return {
            "rate": number / took,
            "service": costs[0] / number * 1e6,
            "store": sum(costs[1:]) / number * 1e6,
            "peak": _peak_mib(process.pid),
        }
    finally:
        await process.stop()


async def _sent(channel: grpc.aio.Channel, exports: int) -> None:
    call: Any = channel.unary_unary(EXPORT)
    queue = iter([export(number) for number in range(exports)])

    async def send() -> None:
        for body in queue:
            await call(body, timeout=30)

    await asyncio.gather(*(send() for _ in range(SENDERS)))


def _peak_mib(pid: int) -> float:
    """Of resident memory, since the start."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def export(number: int) -> bytes:
    request = metrics_service_pb2.ExportMetricsServiceRequest()
    points = request.resource_metrics.add().scope_metrics.add().metrics.add(name="bench").gauge.data_points
    now = time.time_ns()
    for n in range(POINTS):
        point = points.add(as_double=1.0, time_unix_nano=now + n)
        for key, value in (
            ("model", n % 10),
            ("client", n // 10 % 20),
            ("version", 1),
            ("sender", number % 5),
        ):
            point.attributes.add(key=key).value.string_value = f"{key}-{value}"
    return request.SerializeToString()


def main() -> int:
    kinds = ["DuckDB"] + (["InfluxDB"] if shutil.which("influxd") else [])
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(PASSES):
        for kind in kinds:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lingqu-bench-")))
                server = stack.enter_context(influx(folder / "influx")) if kind == "InfluxDB" else None
                url, pid = (server.url, server.pid) if server else ("", None)
                found[kind].append(asyncio.run(measured(url, pid, Layout(folder, OFFSET))))
    print(f"\nmetrics: {SENDERS} senders of {POINTS} gauges with four labels an export, OTLP/gRPC")
    targets = []
    for kind, runs in found.items():
        print(row(f"into {kind}, points kept and acknowledged", [run["rate"] for run in runs], "/s"))
        print(row("  processor time of the service", [run["service"] for run in runs], "µs"))
        if kind == "InfluxDB":
            print(row("  processor time of influxd", [run["store"] for run in runs], "µs"))
        print(row("  most memory of the service", [run["peak"] for run in runs], "MiB"))
        rate = statistics.median(run["rate"] for run in runs)
        targets.append(Target(f"OTLP into {kind}, points/s", rate, 50_000, unit="/s"))
        peak = max(run["peak"] for run in runs)
        targets.append(Target(f"OTLP into {kind}, memory", peak, MAX_MIB, False, "MiB"))
    return judged(targets)


if __name__ == "__main__":
    sys.exit(main())
