"""The registry under load: `python -m bench.registry [--quick] [names]`.

A real etcd and a real registry process. Other work on the machine shows in every figure: run it on an idle
one, and compare only what was measured in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from etcd3aio import _protobuf as etcd_pb
from google.protobuf.duration_pb2 import Duration

from bench.registry_parts import Child, etcd_child, registry_child
from bench.report import Target, judged, row
from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.registry.v1 import instances_pb2 as pb
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from services.core.lifecycle import CHANNEL_OPTIONS
from services.registry.etcd import Etcd, Put
from services.registry.keyspace import INSTANCES

OFFSET = 1200
WATCHERS, WATCHER_PROCESSES, COMMITS = 1_000, 2, 100  # more processes compete for one core
LISTED, LISTS = 10_000, 9
KEEPERS, KEEPER_PROCESSES, KEEP_S, KEEP_PASSES = 2_000, 2, 5.0, 3
CYCLES, QUICK_CYCLES, CYCLERS = 100_000, 10_000, 16
REGISTRATIONS = 300
# The registry has this core to itself where pinned; etcd and the clients have the others. Where all wander
# over two cores, the clients alone take three times the processor time.
REGISTRY_CORE = 0


class Bench:
    """An etcd and a registry; `stub` calls the registry."""

    def __init__(self, etcd: Child, registry: Child, channel: grpc.aio.Channel) -> None:
        self.etcd = etcd
        self.registry = registry
        self.stub: Any = RegistryServiceStub(channel)


@asynccontextmanager
async def running(*, pinned: bool = False) -> AsyncIterator[Bench]:
    everywhere = os.sched_getaffinity(0)
    if pinned:
        os.sched_setaffinity(0, everywhere - {REGISTRY_CORE})
    with tempfile.TemporaryDirectory(prefix="lingqu-bench-") as folder:
        layout = Layout(Path(folder), OFFSET)
        etcd = etcd_child(layout)
        prefix = ("taskset", "-c", str(REGISTRY_CORE)) if pinned else ()
        registry = registry_child(layout, layout.port(at.REGISTRY), etcd.address, prefix=prefix)
        try:
            await etcd.start()
            await registry.start()
            async with grpc.aio.insecure_channel(registry.address, options=CHANNEL_OPTIONS) as channel:
                yield Bench(etcd, registry, channel)
        finally:
            await registry.stop()
            await etcd.stop()
            os.sched_setaffinity(0, everywhere)


@asynccontextmanager
async def clients(kind: str, address: str, streams: int, processes: int) -> AsyncIterator[list[Any]]:
    """Client processes that have said they are ready."""
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.registry_clients", kind, address, str(streams // processes),
            *([f"p{number}"] if kind == "keepalive" else []),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 28,
        )
        for number in range(processes)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        yield started
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def answer(process: Any) -> Any:
    process.stdin.close()
    return json.loads(await process.stdout.readline())


def instance(name: str) -> pb.Instance:
    endpoints = {"grpc": "10.0.0.1:8083", "oip": "10.0.0.1:8001"}
    hosted = [pb.HostedModel(model=m, version=1, state=pb.HOSTED_STATE_READY) for m in ("text", "vectors")]
    return pb.Instance(id=name, service="inference", endpoints=endpoints, models=hosted)


async def watchers(quick: bool) -> list[Target]:
    """From the commit, as a watcher of etcd itself sees it, to each of the registry's watchers having it."""
    begun: dict[int, float] = {}
    committed: dict[int, float] = {}
    received: dict[int, list[float]] = {}
    async with (
        running(pinned=True) as bench,
        clients("watch", bench.registry.address, WATCHERS, WATCHER_PROCESSES) as processes,
    ):
        etcd = Etcd(bench.etcd.address)

        async def bare() -> None:
            async for batch in etcd.watch(INSTANCES, 1):
                for change in batch.changes:
                    committed[change.revision] = time.monotonic()

        watching = asyncio.create_task(bare())
        before = bench.registry.cpu_s()
        for number in range(COMMITS):
            at_ = time.monotonic()
            request = pb.RegisterInstanceRequest(instance=instance(f"i{number}"), ttl=Duration(seconds=600))
            registered = await bench.stub.RegisterInstance(request, timeout=10)
            begun[registered.revision] = at_
            await asyncio.sleep(0.3)
        each_us = (bench.registry.cpu_s() - before) / COMMITS / WATCHERS * 1e6
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await etcd.close()
        for told in await asyncio.gather(*(answer(p) for p in processes)):
            for revision, times in told.items():
                received.setdefault(int(revision), []).extend(times)
    for revision in begun:
        assert len(received[revision]) == WATCHERS, f"{len(received[revision])} watchers saw {revision}"
    delays = [[(t - committed[revision]) * 1000 for t in received[revision]] for revision in begun]
    writes = [(committed[revision] - at_) * 1000 for revision, at_ in begun.items()]
    last = [max(each) for each in delays]
    everything = sorted(itertools.chain.from_iterable(delays))
    p99 = everything[int(len(everything) * 0.99)]
    print(f"\nwatch: from etcd having it to each of {WATCHERS} watchers in {WATCHER_PROCESSES} processes")
    print(row("RegisterInstance called to etcd has it", writes, "ms"))
    print(row("a watcher has it after", everything, "ms"))
    print(row("the last watcher has it after", last, "ms"))
    print(row("registry's processor time for each", [each_us], "µs"))
    return [Target("commit to all watchers, p99", p99, 100, at_least=False, unit="ms")]


async def listing(quick: bool) -> list[Target]:
    async with running() as bench:
        etcd = Etcd(bench.etcd.address)
        lease = await etcd.grant(600)
        for start in range(0, LISTED, 100):
            names = [f"i{number:05d}" for number in range(start, start + 100)]
            await etcd.commit([Put(INSTANCES + n, instance(n).SerializeToString(), lease) for n in names])
        await etcd.close()
        seconds: dict[str, list[float]] = {"": [], "inference": []}
        for _ in range(LISTS):
            for service, times in seconds.items():
                at_ = time.perf_counter()
                listed = await bench.stub.ListInstances(pb.ListInstancesRequest(service=service), timeout=10)
                times.append(time.perf_counter() - at_)
                assert len(listed.instances) == LISTED
    print(f"\nlist: {LISTED} instances")
    print(row("all", seconds[""], "s"))
    print(row("of one service", seconds["inference"], "s"))
    slowest = max(statistics.median(times) for times in seconds.values())
    return [Target(f"{LISTED} instances listed", slowest, 0.3, at_least=False, unit="s")]


async def keepalives(quick: bool) -> list[Target]:
    rates, p99s, each_us = [], [], []
    async with running(pinned=True) as bench:
        for _ in range(1 if quick else KEEP_PASSES):
            async with clients("keepalive", bench.registry.address, KEEPERS, KEEPER_PROCESSES) as processes:
                for process in processes:
                    process.stdin.write(b"go\n")
                at_, before = time.monotonic(), bench.registry.cpu_s()
                await asyncio.sleep(KEEP_S)
                used = bench.registry.cpu_s() - before
                delays = sorted(itertools.chain.from_iterable([await answer(p) for p in processes]))
                rates.append(len(delays) / (time.monotonic() - at_))
                each_us.append(used / len(delays) * 1e6)
                p99s.append(delays[int(len(delays) * 0.99)])
    print(
        f"\nkeep-alive: {KEEPERS} instances, a stream each, one request after the other; registry on a core"
    )
    print(row("keep-alives", rates, "1/s"))
    print(row("p99", p99s, "s"))
    print(row("registry's processor time for each", each_us, "µs"))
    return [Target("keep-alives a second on one core", statistics.median(rates), 2_000, unit="1/s")]


async def memory(quick: bool) -> list[Target]:
    cycles = QUICK_CYCLES if quick else CYCLES
    first = cycles // 10
    async with running() as bench:
        numbers = iter(range(cycles))

        async def cycle(most: int) -> None:
            for number in numbers:
                name = f"i{number % 1000}-{number % CYCLERS}"
                request = pb.RegisterInstanceRequest(instance=instance(name), ttl=Duration(seconds=60))
                lease = (await bench.stub.RegisterInstance(request, timeout=30)).lease_id
                gone = pb.DeregisterInstanceRequest(id=name, lease_id=lease)
                await bench.stub.DeregisterInstance(gone, timeout=30)
                if number >= most:
                    return

        begun = time.monotonic()
        await asyncio.gather(*(cycle(first) for _ in range(CYCLERS)))
        early, etcd_early = bench.registry.rss_mib(), bench.etcd.rss_mib()
        await asyncio.gather(*(cycle(cycles) for _ in range(CYCLERS)))
        late, etcd_late = bench.registry.rss_mib(), bench.etcd.rss_mib()
        seconds = time.monotonic() - begun
    print(f"\nmemory: {cycles:,} registrations and deregistrations, {cycles / seconds:,.0f} a second")
    print(f"  resident after {first:,} and {cycles:,}: registry {early:.0f} and {late:.0f} MiB,", end=" ")
    print(f"etcd (it keeps an hour of history) {etcd_early:.0f} and {etcd_late:.0f} MiB")
    return [Target(f"registry's memory, {cycles:,} ÷ {first:,} cycles", late / early, 1.1, at_least=False)]


async def latency(quick: bool) -> list[Target]:
    """RegisterInstance and a put of the same bytes to etcd, in turn."""
    ours, bare = [], []
    async with (
        running() as bench,
        grpc.aio.insecure_channel(bench.etcd.address, options=CHANNEL_OPTIONS) as channel,
    ):
        kv: Any = etcd_pb.KVStub(channel)
        for number in range(REGISTRATIONS):
            record = instance(f"i{number}")
            at_ = time.perf_counter()
            request = pb.RegisterInstanceRequest(instance=record, ttl=Duration(seconds=600))
            await bench.stub.RegisterInstance(request, timeout=10)
            between = time.perf_counter()
            put = etcd_pb.PutRequest(key=f"/bench/{number}".encode(), value=record.SerializeToString())
            await kv.Put(put, timeout=10)
            ours.append((between - at_) * 1000)
            bare.append((time.perf_counter() - between) * 1000)
    print("\nlatency: one call at a time")
    print(row("RegisterInstance", ours, "ms"))
    print(row("put to etcd", bare, "ms"))
    quotient = statistics.median(ours) / statistics.median(bare)
    return [Target("RegisterInstance ÷ put to etcd, medians", quotient, 3, at_least=False)]


ALL = {
    "watchers": watchers,
    "list": listing,
    "keepalive": keepalives,
    "latency": latency,
    "memory": memory,
}


async def main(names: list[str], quick: bool) -> int:
    targets: list[Target] = []
    for name in names:
        targets += await ALL[name](quick)
    return judged(targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ALL)}; none: all")
    parser.add_argument("--quick", action="store_true", help="fewer cycles and passes")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ALL):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    sys.exit(asyncio.run(main(arguments.names or list(ALL), arguments.quick)))
