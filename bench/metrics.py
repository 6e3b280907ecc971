"""What telling the metrics service of requests costs (`make bench-metrics`).

Envoys with all policies that tell of every request, of one in ten and of none take turns before one Triton
with an echo model: many short turns, since a rate drifts by more than what is looked for. Processor time of
Envoy is the price on the way of a request; that of the service is paid behind it."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil

from bench import contestants, gateway, tensor
from bench.report import Target, row
from bench.suite import Suite
from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import Options, metrics
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub

PASSES = 40
REQUESTS = 5_000
NOT_TOLD, TOLD, DEFAULT = "not told", "told", "one in ten told"
SETTLE_S = 1.5
OFFSET = 500  # to the suite's ports


async def measure(suite: Suite) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    await suite.publish_echo()
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder), suite.layout.offset + OFFSET)
        process = await Running.start(metrics(layout, Options()), layout.logs)
        try:
            await process.until_ready()
            service = psutil.Process(process.pid)
            return await asyncio.to_thread(_requests, suite, layout.address(at.METRICS), service)
        finally:
            await process.stop()


def _requests(suite: Suite, address: str, service: psutil.Process) -> list[Target]:
    kinds = {
        NOT_TOLD: gateway.policies(suite),
        TOLD: gateway.policies(suite, metrics=address, percent=100),
        DEFAULT: gateway.policies(suite, metrics=address),
    }
    with ExitStack() as stack, tempfile.NamedTemporaryFile(suffix=".grpc") as file:
        file.write(tensor.frame())
        file.flush()
        envoys = {}
        for number, (name, made) in enumerate(kinds.items()):
            at_ = f"127.0.0.1:{gateway.PORT + 40 + number + suite.layout.offset}"
            running = stack.enter_context(contestants.envoy_with(contestants.static(made), at_))
            envoys[name] = Loaded(suite.key, file.name, at_, running.pid)
        for envoy in envoys.values():
            tensor.once(envoy.address, suite.key)
            envoy.load()
        time.sleep(SETTLE_S)
        begun, used = _told(address), _cpu_s(service.pid)
        all_told = _pairs(envoys[NOT_TOLD], envoys[TOLD], PASSES)
        time.sleep(SETTLE_S)
        lines = _told(address) - begun
        behind = (_cpu_s(service.pid) - used) / lines * 1e6
        default = _pairs(envoys[NOT_TOLD], envoys[DEFAULT], PASSES)
    print(
        f"\nmetrics: ModelInfer of an echo model, h2load -c 4 -m 16 -n {REQUESTS}, in pairs with and without"
    )
    figures: dict[str, list[float]] = {}
    for name, pairs in ((TOLD, all_told), (DEFAULT, default)):
        print(row(f"{name} ÷ not told, req/s", [one.rate / other.rate for other, one in pairs], "×"))
        figures[name] = [(one.envoy - other.envoy) for other, one in pairs]
        print(row(f"{name} − not told, processor time of Envoy", figures[name], "µs"))
    machine = [other.machine for other, _ in default]
    print(row("not told, throughput", [other.rate for other, _ in default], "req/s"))
    print(row("not told, processor time of Envoy", [other.envoy for other, _ in default], "µs"))
    print(row("not told, processor time of everything", machine, "µs"))
    print(f"  the service's processor time for a line, of {lines:,.0f}{behind:25.1f} µs")
    added = statistics.median(figures[DEFAULT])
    share = (added + behind / 10) / statistics.median(machine) * 100
    ratio = statistics.median(one.rate / other.rate for other, one in default)
    return [
        Target(
            "Envoy's processor time, told", statistics.median(figures[TOLD]), 20, at_least=False, unit="µs"
        ),
        Target("Envoy's processor time, one in ten told", added, 20, at_least=False, unit="µs"),
        Target("one in ten told (default) ÷ not told, req/s", ratio, 0.98),
        Target("processor time of telling, of a request's (default)", share, 2, at_least=False, unit="%"),
    ]


class Taken(NamedTuple):
    """Requests a second; µs a request of processor time, of Envoy and of the whole machine."""

    rate: float
    envoy: float
    machine: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """An Envoy with load."""

    key: str
    frame: str
    address: str
    pid: int

    def load(self) -> Taken:
        used, busy = _cpu_s(self.pid), _busy_s()
        rate = tensor.load(self.address, self.key, self.frame, REQUESTS)
        used, busy = _cpu_s(self.pid) - used, _busy_s() - busy
        return Taken(rate, used / REQUESTS * 1e6, busy / REQUESTS * 1e6)


def _pairs(one: Loaded, other: Loaded, number: int) -> list[tuple[Taken, Taken]]:
    """One after the other and the other after the one, so that what drifts weighs on both."""
    found = []
    for turn in range(number):
        if turn % 2:
            second, first = other.load(), one.load()
        else:
            first, second = one.load(), other.load()
        found.append((first, second))
    return found


def _cpu_s(pid: int) -> float:
    """Processor seconds of all threads that there are, to the nanosecond (proc(5): schedstat)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _busy_s() -> float:
    """Processor seconds of everything on this machine."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _told(address: str) -> float:
    with grpc.insecure_channel(address) as channel:
        stub: Any = MetricsServiceStub(channel)
        answer = stub.Query(pb.QueryRequest(measurement="requests", aggregate=pb.AGGREGATE_SUM), timeout=30)
    return sum(sample.value for series in answer.series for sample in series.samples)
