"""Registries and their clients under faults: killed, paused, too slow. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.registry_parts import Child
from lingqu.registry.v1 import instances_pb2 as pb
from tests.outages import (
    TTL_S,
    Suite,
    client_of,
    fleet,
    paused,
    read_to_the_end,
    running,
)
from tests.registries import refused, register
from tests.waiting import pause, until

pytestmark = pytest.mark.chaos


async def test_a_registry_is_killed(tmp_path: Path) -> None:
    """Instances stay, and watchers go on at another registry without a snapshot."""
    async with running(tmp_path) as suite, fleet(suite.addresses) as living:
        victim = suite.used_by(living.client)
        await victim.kill()
        await register_somewhere(suite, victim, "late")
        living.names = sorted([*living.names, "late"])
        await until(living.complete, "the watcher goes on elsewhere", timeout_s=20)
        await pause(TTL_S + 1, "leases that nobody renewed would be over")
        assert await living.complete()
        assert living.told.removed == []
        assert living.told.snapshots == 1


async def register_somewhere(suite: Suite, victim: Child, name: str) -> None:
    address = next(r.address for r in suite.registries if r is not victim)
    async with client_of(address) as client:
        await register(client, pb.Instance(id=name, service="inference"), ttl_s=300)


async def test_a_registry_is_paused(tmp_path: Path) -> None:
    """It accepts connections and does not answer: it is left before the leases end."""
    async with running(tmp_path) as suite, fleet(suite.addresses, ttl_s=9) as living:
        victim = suite.used_by(living.client)
        with paused(victim):
            await register_somewhere(suite, victim, "late")
            await until(lambda: "late" in living.told.items, "the watcher goes on elsewhere", timeout_s=15)
            await pause(6.0, "leases that nobody renewed would be over")
            assert living.told.removed == []
            assert living.told.snapshots == 1


@asynccontextmanager
async def replica(addresses: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process registered as "i1" with a TTL of two seconds."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.replica", addresses, "i1", str(port), "2"
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        await process.wait()


async def test_a_replica_is_paused_and_wakes_up(tmp_path: Path) -> None:
    async with running(tmp_path, registries=1) as suite, client_of(suite.addresses) as client:

        async def shown() -> list[str]:
            answer = await client.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
            return [i.endpoints["grpc"].rpartition(":")[2] for i in answer.instances]

        async def is_shown(*ports: str) -> bool:
            return await shown() == list(ports)

        async with replica(suite.addresses, 1) as first:
            await until(lambda: is_shown("1"), "registered")
            first.send_signal(signal.SIGSTOP)
            await until(lambda: is_shown(), "its lease ends")
            first.send_signal(signal.SIGCONT)
            await until(lambda: is_shown("1"), "it is back by itself", timeout_s=8)

            first.send_signal(signal.SIGSTOP)
            await until(lambda: is_shown(), "its lease ends again")
            async with replica(suite.addresses, 2) as second:
                await until(lambda: is_shown("2"), "its successor is there")
                first.send_signal(signal.SIGCONT)
                await pause(4.0, "it tries to come back meanwhile")
                assert await is_shown("2")
                first.send_signal(signal.SIGTERM)
                await first.wait()
                assert await is_shown("2")
                second.send_signal(signal.SIGTERM)
                await second.wait()
            assert await shown() == []


async def test_a_watcher_that_does_not_read_is_cut_off_and_costs_little(tmp_path: Path) -> None:
    async with running(tmp_path, registries=1) as suite, client_of(suite.addresses) as client:
        watches: list[Any] = []
        for _ in range(20):
            watch: Any = client.instances.WatchInstances(pb.WatchInstancesRequest())
            assert (await watch.read()).snapshot
            watches.append(watch)
        before = suite.registries[0].rss_mib()
        models = [pb.HostedModel(model="m", version=n + 1, detail="x" * 1000) for n in range(200)]
        for number in range(150):  # 200 kB each: 30 MB for each of them
            big = pb.Instance(id=f"i{number % 3}", service="inference", models=models)
            big.labels["number"] = str(number)
            await register(client, big, ttl_s=300)
        await pause(7.0, "they are given time to read, and do not")
        grown = suite.registries[0].rss_mib() - before
        assert grown < 200, f"{grown:.0f} MiB for 20 watchers that would be told 30 MB each"
        error = await refused(read_to_the_end(watches[0]))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_WATCHER")
        assert error.retry_after_s
        for watch in watches:
            watch.cancel()
