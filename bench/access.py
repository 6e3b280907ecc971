"""`python -m bench.access`: allow-lists with many clients, and how soon a revoked key is refused.

One Envoy that follows the real discovery service, before a backend that answers at once: without any client,
and with 1,000 clients of 50 models each among 500 and 1,000 revoked keys. Processor time is that of the Envoy
process, by interleaved passes."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path

import grpc
import psutil

from bench.report import row
from services.core.access import Access, Client, RevokedKey
from services.core.discovery import VersionKey
from services.gateway import xds
from tests.planes import Backend, Plane, hosting, model, plane

CLIENTS, MODELS, OF_CLIENT, REVOKED = 1_000, 500, 50, 1_000
PASSES, REQUESTS, AT_ONCE, REVOCATIONS = 7, 4_000, 64, 20


async def main() -> None:
    names = [f"team-{number % 20}-model-{number:03d}" for number in range(MODELS)]
    chosen = random.Random(1)
    clients = [
        Client(f"client-{number:04d}", tuple(chosen.sample(names, OF_CLIENT))) for number in range(CLIENTS)
    ]
    clients.append(Client("tester", (*chosen.sample(names, OF_CLIENT - 1), "m")))
    revoked = [RevokedKey(f"{number:016x}") for number in range(REVOKED)]
    many = Access(tuple(sorted(clients, key=lambda client: client.name)), tuple(revoked))
    backend = Backend()
    await backend.start()
    with tempfile.TemporaryDirectory() as folder:
        async with plane(Path(folder)) as made:
            await _measure(made, backend.address, many)
    await backend.stop()


async def _measure(made: Plane, address: str, many: Access) -> None:
    replicas = [hosting("r", address, VersionKey("m", 1))]
    envoy = _envoy(made.admin)
    caller = await made.caller("tester")
    costs: dict[str, list[float]] = {"no clients": [], f"{CLIENTS:,} clients": []}
    for _ in range(PASSES):
        for name, access in zip(costs, (Access(), many), strict=True):
            await made.show(replicas, [model("m", 100)], access)
            costs[name].append(await _cost(caller, envoy))
    delays = []
    for number in range(REVOCATIONS):
        key = RevokedKey(f"new-{number}")
        many = Access(many.clients, (*many.revoked, key))
        begun = time.perf_counter()
        await made.show(replicas, [model("m", 100)], many)
        delays.append((time.perf_counter() - begun) * 1000)
    current = made.snapshots.current
    size = current.resources[xds.EXTENSIONS]["access"].ByteSize() if current else 0
    print(f"\naccess: {CLIENTS:,} clients of {OF_CLIENT} models among {MODELS}, {REVOKED:,} revoked keys")
    for name, found in costs.items():
        print(row(f"{name}, Envoy's processor time", found, "µs"))
    print(row("one more revoked key, until Envoy has it", delays, "ms"))
    print(f"  the configuration has {size:,} bytes")


async def _cost(caller: object, envoy: psutil.Process) -> float:
    """Microseconds of processor time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            answer = await caller.ask("m")  # type: ignore[attr-defined]
            if answer.code is not grpc.StatusCode.OK:
                raise RuntimeError(answer.text)

    before = envoy.cpu_times()
    await asyncio.gather(*(one() for _ in range(REQUESTS)))
    after = envoy.cpu_times()
    return (after.user + after.system - before.user - before.system) / REQUESTS * 1e6


def _envoy(admin: str) -> psutil.Process:
    """The child of this process that has the admin port."""
    port = int(admin.rpartition(":")[2])
    for child in psutil.Process().children():
        if any(conn.laddr.port == port for conn in child.net_connections() if conn.laddr):
            return child
    raise RuntimeError("there is no Envoy")


if __name__ == "__main__":
    asyncio.run(main())
