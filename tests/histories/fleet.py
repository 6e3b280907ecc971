"""One etcd and several registries as processes, and a nemesis that kills and pauses them at random times."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from tests.conftest import EtcdServer
from tests.registries import RegistryProcess
from tests.waiting import pause

SETTINGS = {"LINGQU_GRACE_S": "0.1"}


class Fleet:
    def __init__(self, etcd: EtcdServer, registries: list[RegistryProcess]) -> None:
        self.etcd = etcd
        self.registries = registries
        self.addresses = [registry.address for registry in registries]
        self.faults: list[str] = []

    async def kill_registry(self, number: int, away_s: float) -> None:
        self.faults.append(f"kill registry {number}, start it after {away_s:.1f} s")
        await self.registries[number].kill()
        await pause(away_s, "it is away")
        address = self.addresses[number]
        self.registries[number] = await RegistryProcess.start(
            self.etcd, f"registry-{number}", address=address, env=SETTINGS
        )

    async def kill_etcd(self, away_s: float) -> None:
        """It comes back on the same data under the same address."""
        self.faults.append(f"kill etcd, start it after {away_s:.1f} s")
        await self.etcd.kill()
        await pause(away_s, "it is away")
        await self.etcd.start()

    async def pause(self, pid: int, name: str, seconds: float) -> None:
        self.faults.append(f"pause {name} for {seconds:.1f} s")
        os.kill(pid, signal.SIGSTOP)
        try:
            await pause(seconds, "it stands still")
        finally:
            os.kill(pid, signal.SIGCONT)

    def check(self) -> None:
        """Nobody but the nemesis ends a process."""
        for number, registry in enumerate(self.registries):
            assert psutil.pid_exists(registry.pid), f"registry {number} has ended by itself; its log says why"

    async def stop(self) -> None:
        for registry in self.registries:
            await registry.stop()


@asynccontextmanager
async def fleet(etcd: EtcdServer, size: int) -> AsyncIterator[Fleet]:
    started = [RegistryProcess.start(etcd, f"registry-{n}", env=SETTINGS) for n in range(size)]
    running = Fleet(etcd, list(await asyncio.gather(*started)))
    try:
        yield running
    finally:
        await running.stop()


async def nemesis(fleet: Fleet, rng: random.Random, stop: asyncio.Event) -> None:
    """Faults of etcd beside faults of registries, until told to stop; all is healed at the end."""

    async def faults_of_etcd() -> None:
        while not await _passed(stop, rng.uniform(2, 6)):
            if rng.random() < 0.5:
                await fleet.kill_etcd(rng.uniform(0, 1.5))
            else:
                await fleet.pause(fleet.etcd.pid, "etcd", rng.choice((0.2, 1.0, 3.5, 6.0)))

    async def faults_of_registries() -> None:
        while not await _passed(stop, rng.uniform(0.2, 1.5)):
            fleet.check()
            number = rng.randrange(len(fleet.registries))
            if rng.random() < 0.3:
                await fleet.kill_registry(number, rng.uniform(0, 1))
            else:
                pid = fleet.registries[number].pid
                await fleet.pause(pid, f"registry {number}", rng.choice((0.1, 0.3, 1.0, 6.0)))

    async with asyncio.TaskGroup() as group:
        group.create_task(faults_of_etcd())
        group.create_task(faults_of_registries())


async def _passed(stop: asyncio.Event, seconds: float) -> bool:
    """Whether we were told to stop within that time."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return False
    return True
