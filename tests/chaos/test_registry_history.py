"""Many clients, random operations, random kills: whatever happens, what etcd's history has is what clients
were acknowledged and what watchers were told. The same seed makes the same choices, not the same timing:
LINGQU_HISTORY_SEED=<n> repeats them, LINGQU_HISTORY_S=<seconds> sets how long the soak lasts."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import pytest

from tests.conftest import EtcdServer, show_logs
from tests.histories import truth
from tests.histories.checker import problems
from tests.histories.clients import WATCHES, Crowd
from tests.histories.fleet import Fleet, fleet, nemesis
from tests.histories.views import timelines

pytestmark = pytest.mark.chaos

CLIENTS = 6
REGISTRIES = 3
SETTLE_S = 40


async def test_no_acknowledged_write_is_lost_and_no_watcher_misled(etcd_server: EtcdServer) -> None:
    await check_history(etcd_server, seconds=15, pace_s=0.02)


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_a_long_history_holds_too(etcd_server: EtcdServer) -> None:
    await check_history(etcd_server, seconds=float(os.environ.get("LINGQU_HISTORY_S", "240")), pace_s=0.02)


async def check_history(etcd: EtcdServer, seconds: float, pace_s: float) -> None:
    seed = int(os.environ.get("LINGQU_HISTORY_SEED") or random.randrange(1 << 32))
    print(f"LINGQU_HISTORY_SEED={seed}")  # noqa: T201 - shown when the test fails
    try:
        async with fleet(etcd, REGISTRIES) as running:
            crowd = await recorded(running, random.Random(seed), seconds, pace_s)
        history = await truth.read(etcd.address)
        outcomes = Counter(op.outcome.value for op in crowd.operations)
        messages = sum(len(stream.messages) for stream in crowd.streams)
        print(*running.faults, sep="\n")  # noqa: T201
        print(f"{history.last} revisions, {dict(outcomes)}, {messages} messages of watchers")  # noqa: T201
        found = problems(history, crowd.operations, crowd.streams)
        assert not found, "\n".join(found[:20])
    finally:
        show_logs(etcd.layout)


async def recorded(running: Fleet, rng: random.Random, seconds: float, pace_s: float) -> Crowd:
    """Load and faults for so long; then all is healed, and every watcher is told of the last change."""
    crowd = Crowd(running.addresses, rng)
    await crowd.prepare()
    watchers = [asyncio.create_task(crowd.watcher(view, at)) for view in WATCHES for at in range(REGISTRIES)]
    clients = [asyncio.create_task(crowd.client(pace_s)) for _ in range(CLIENTS)]
    stop = asyncio.Event()
    faults = asyncio.create_task(nemesis(running, rng, stop))
    await asyncio.wait([faults, *clients, *watchers], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    await faults
    await ended(clients)
    running.check()
    async with asyncio.timeout(SETTLE_S):
        await crowd.mark()
        await ended(watchers)
        last = {view: line.last for view, line in timelines(await truth.read(running.etcd.address)).items()}
        await crowd.catch_up(last)
    await crowd.close()
    return crowd


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    """Raises what a task failed with, if it did before it was cancelled."""
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
