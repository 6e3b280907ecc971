"""The metrics service (`make bench-metrics`): points a second by OTLP, and what telling of requests costs.

An Envoy with all policies that tells of every request, and one that does not, take turns before one Triton
with an echo model. Processor time of Envoy is the price on the way of a request; that of the service is paid
behind it."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from bench import contestants, gateway, tensor
from bench.report import Target, ratio, row
from bench.suite import Suite
from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import Options, metrics
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub

PASSES = 3
EXPORTS = 300
POINTS = 1_000  # of an export
SENDERS = 16
OFFSET = 500  # to the suite's ports
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


async def measure(suite: Suite) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    await suite.publish_echo()
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder), suite.layout.offset + OFFSET)
        process = await Running.start(metrics(layout, Options()), layout.logs)
        try:
            await process.until_ready()
            service = psutil.Process(process.pid)
            found = await _ingest(layout.address(at.METRICS), service)
            return found + await asyncio.to_thread(_requests, suite, layout.address(at.METRICS), service)
        finally:
            await process.stop()


async def _ingest(address: str, service: psutil.Process) -> list[Target]:
    rates, costs = [], []
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(EXPORT)
        for _ in range(3):
            bodies = [_export(number) for number in range(EXPORTS)]
            queue = iter(bodies)

            async def send(queue: Any = queue) -> None:
                for body in queue:
                    await call(body, timeout=30)

            used, begun = contestants.cpu_s(service), time.perf_counter()
            await asyncio.gather(*(send() for _ in range(SENDERS)))
            rates.append(EXPORTS * POINTS / (time.perf_counter() - begun))
            costs.append((contestants.cpu_s(service) - used) / (EXPORTS * POINTS) * 1e6)
        sum_ = pb.QueryRequest(measurement="bench", aggregate=pb.AGGREGATE_SUM)
        answer: Any = await MetricsServiceStub(channel).Query(sum_, timeout=30)
        kept = sum(sample.value for series in answer.series for sample in series.samples)
        assert kept == 3 * EXPORTS * POINTS, f"{kept} points were kept"
    memory = service.memory_info().rss / (1 << 20)
    print(
        f"\nmetrics: {SENDERS} senders of {POINTS} gauges with four labels an export, OTLP/gRPC into DuckDB"
    )
    print(row("points kept and acknowledged", rates, "/s"))
    print(row("processor time of the service", costs, "µs"))
    print(f"  memory of the service afterwards{memory:23,.0f} MiB")
    return [Target("OTLP into DuckDB, points/s", statistics.median(rates), 50_000, unit="/s")]


def _export(number: int) -> bytes:
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


def _requests(suite: Suite, address: str, service: psutil.Process) -> list[Target]:
    kinds = {
        "not told": gateway.policies(suite),
        "told": gateway.policies(suite, metrics=address, percent=100),
        "one in ten told": gateway.policies(suite, metrics=address),
    }
    with ExitStack() as stack, tempfile.NamedTemporaryFile(suffix=".grpc") as file:
        file.write(tensor.frame())
        file.flush()
        addresses, running = {}, {}
        for number, (name, made) in enumerate(kinds.items()):
            addresses[name] = f"127.0.0.1:{gateway.PORT + 40 + number + suite.layout.offset}"
            running[name] = stack.enter_context(
                contestants.envoy_with(contestants.static(made), addresses[name])
            )
        used, begun = contestants.cpu_s(service), _told(address)
        rates, costs = gateway.Load(suite, file.name).interleaved(addresses, running, PASSES)
        time.sleep(2)
        told, used = _told(address) - begun, contestants.cpu_s(service) - used
    sent = 2 * (PASSES * gateway.REQUESTS + gateway.REQUESTS // 4 + 1)
    print(f"\nmetrics: ModelInfer of an echo model, h2load -c 4 -m 16 -n {gateway.REQUESTS}")
    for name in addresses:
        print(row(f"{name}, throughput", rates[name], "req/s"))
        print(row(f"{name}, processor time of Envoy", costs[name], "µs"))
    print(
        f"  told of {told:,.0f} of {sent:,} requests; {used / max(told, 1) * 1e6:.1f} µs each in the service"
    )
    added = statistics.median(a - b for a, b in zip(costs["told"], costs["not told"], strict=True))
    return [
        Target("Envoy's processor time to tell of a request", added, 20, at_least=False, unit="µs"),
        Target(
            "tensor path, one in ten told (default) ÷ not told, req/s",
            ratio(rates["one in ten told"], rates["not told"]),
            0.98,
        ),
    ]


def _told(address: str) -> float:
    with grpc.insecure_channel(address) as channel:
        stub: Any = MetricsServiceStub(channel)
        answer = stub.Query(pb.QueryRequest(measurement="requests", aggregate=pb.AGGREGATE_SUM), timeout=30)
    return sum(sample.value for series in answer.series for sample in series.samples)
