"""What telling the metrics service of requests costs (`make bench-metrics`).

Envoys with all policies that tell of every request, of as many as by default and of none take turns before
one Triton with an echo model: many short turns, since a rate drifts by more than what is looked for. What of
the processor Envoy takes is the price on the way of a request; what the service takes is paid behind it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median as middle
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
from services.gateway.listener import TOLD_PERCENT
from tests.statics import static

PASSES = {100: 20, TOLD_PERCENT: 60}  # by how many requests in a hundred are told
REQUESTS = 5_000
SETTLE_S = 2.5  # until what was told is kept
IDLE_S = 4.0
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
    kinds = {percent: gateway.policies(suite, metrics=address, percent=percent) for percent in PASSES}
    kinds[0] = gateway.policies(suite)
    with ExitStack() as stack, tempfile.NamedTemporaryFile(suffix=".grpc") as file:
        file.write(tensor.frame())
        file.flush()
        envoys = {}
        for number, (percent, made) in enumerate(kinds.items()):
            at_ = f"127.0.0.1:{gateway.PORT + 40 + number + suite.layout.offset}"
            running = stack.enter_context(contestants.envoy_with(static(made), at_))
            envoys[percent] = Loaded(suite.key, file.name, at_, running.pid)
        for envoy in envoys.values():
            tensor.once(envoy.address, suite.key)
            envoy.load()
        time.sleep(SETTLE_S)
        used = _cpu_s(service.pid)
        time.sleep(IDLE_S)
        idle = (_cpu_s(service.pid) - used) / IDLE_S
        found = {
            percent: _compared(envoys[0], envoys[percent], passes, service, idle, address)
            for percent, passes in PASSES.items()
        }
    print(
        f"\nmetrics: ModelInfer of an echo model, h2load -c 4 -m 16 -n {REQUESTS}, in pairs with and without"
    )
    for percent, compared in found.items():
        name = f"{percent} % told"
        print(row(f"{name} ÷ not told, req/s", compared.ratios, "×"))
        print(row(f"{name} − not told, processor time of Envoy", compared.added, "µs"))
        print(f"  {name}, processor time of the service, a request{compared.behind:12.2f} µs")
        sent = len(compared.pairs) * REQUESTS
        print(f"  {name}, requests counted, of {sent:,}{compared.counted:22,.0f}")
    default = found[TOLD_PERCENT]
    machine = [without.machine for without, _ in default.pairs]
    print(row("not told, throughput", [without.rate for without, _ in default.pairs], "req/s"))
    print(row("not told, processor time of Envoy", [without.envoy for without, _ in default.pairs], "µs"))
    print(row("not told, processor time of everything", machine, "µs"))
    print(f"  the service, while nobody asks{idle * 100:31.2f} % of a processor")
    share = (middle(default.added) + default.behind) / middle(machine) * 100
    return [
        Target("Envoy's processor time, told", middle(found[100].added), 20, at_least=False, unit="µs"),
        Target("told by default ÷ not told, req/s", middle(default.ratios), 0.98),
        Target("processor time of telling, of a request's (default)", share, 2, at_least=False, unit="%"),
    ]


@dataclass(frozen=True, slots=True)
class Compared:
    """Turns of an Envoy that does not tell and of one that does; `behind`: µs of the service for each request
    of the one that does, beyond what it takes anyway; `counted`: those requests, as the store has them."""

    pairs: list[tuple[Taken, Taken]]
    behind: float
    counted: float

    @property
    def ratios(self) -> list[float]:
        return [told.rate / without.rate for without, told in self.pairs]

    @property
    def added(self) -> list[float]:
        """µs a request, of Envoy."""
        return [told.envoy - without.envoy for without, told in self.pairs]


def _compared(
    without: Loaded, told: Loaded, passes: int, service: psutil.Process, idle: float, address: str
) -> Compared:
    counted, begun, used = _counted(address), time.monotonic(), _cpu_s(service.pid)
    pairs = _pairs(without, told, passes)
    time.sleep(SETTLE_S)
    used = _cpu_s(service.pid) - used - idle * (time.monotonic() - begun)
    return Compared(pairs, used / (passes * REQUESTS) * 1e6, _counted(address) - counted)


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


def _counted(address: str) -> float:
    with grpc.insecure_channel(address) as channel:
        stub: Any = MetricsServiceStub(channel)
        answer = stub.Query(pb.QueryRequest(measurement="requests", aggregate=pb.AGGREGATE_SUM), timeout=30)
    return sum(float(sample.value) for series in answer.series for sample in series.samples)
