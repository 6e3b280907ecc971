"""Global limits: `python -m bench.limits [names]` of decisions, latency, trouble.

What a decision costs the control plane that owns it, with and without the ledger, and one that has to ask
another; what a limit adds to a request through Envoy; and whether four gateways stay within limits while
control planes and Envoys are killed and stopped. Processor time is counted, too: on a machine with other work
it drifts less than rates.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
import psutil
from envoy.service.ratelimit.v3 import rls_pb2

from bench.fleet import MODEL, Caller, Fleet, Gateway, fleet
from bench.limit_load import Load, trouble
from bench.report import Target, judged, row
from services.gateway.limits.rules import shard_of

OFFSET = 1600
PASSES, DECISIONS, SEQUENTIAL = 3, 4_000, 400
TROUBLE_S = 120
METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
HUGE = 4_000_000
CLIENTS = {
    "second": {"requests_per_second": 20},
    "minute": {"requests_per_minute": 240},
    "both": {"requests_per_second": 16, "requests_per_minute": 400},
}
FAIL_CLOSED = {"LINGQU_LIMITS_FAIL": "closed"}


async def decisions() -> list[Target]:
    """h2load asks one of two control planes for a client that it owns, and for one that it does not."""
    rates: dict[str, list[float]] = {}
    per_core: dict[str, list[float]] = {}
    async with _fleet(2, {"LINGQU_LIMITS_TIMEOUT_S": "1"}) as made:
        asked = made.gateways[0]
        for unit in ("second", "minute"):
            names = await _owned(made, {f"requests_per_{unit}": HUGE})
            rates |= {f"own, per {unit}": [], f"another's, per {unit}": []}
            for number in range(PASSES + 1):
                for name, client in zip((f"own, per {unit}", f"another's, per {unit}"), names, strict=True):
                    control = psutil.Process(asked.control.pid)
                    before, begun = _seconds(control), time.monotonic()
                    await asyncio.to_thread(_decide, asked, client)
                    if number:  # the first warms up
                        rates[name].append(DECISIONS / (time.monotonic() - begun))
                        per_core.setdefault(name, []).append(DECISIONS / (_seconds(control) - before))
    print(f"\nglobal limits, decisions: h2load -c 4 -m 16 -n {DECISIONS} at one of two control planes")
    for name, values in rates.items():
        print(row(f"{name}", values, "1/s"))
        print(row(f"{name}, a core of the one asked", per_core[name], "1/s"))
    least = statistics.median(per_core["own, per minute"])
    return [Target("decisions a control plane's core, per minute", least, 2_000, unit="1/s")]


async def latency() -> list[Target]:
    """One request at a time through Envoy, with and without limits in turn. Envoy asks either of two control
    planes, so that every other question is passed on to the owner."""
    kinds = {
        "free": {},
        "per second": {"requests_per_second": HUGE},
        "per minute": {"requests_per_minute": HUGE},
    }
    async with _fleet(2, FAIL_CLOSED | {"LINGQU_LIMITS_TIMEOUT_S": "1"}) as made:
        callers = {}
        for kind, limits in kinds.items():
            name = kind.replace(" ", "-")
            await made.limit(name, **limits)
            callers[kind] = Caller(made, made.gateways[0], name)
        await asyncio.sleep(1.5)
        took: dict[str, list[float]] = {name: [] for name in callers}
        for number in range(SEQUENTIAL + 50):
            for name, caller in callers.items():
                begun = time.perf_counter()
                code = await caller.ask()
                assert code == grpc.StatusCode.OK, code
                if number >= 50:
                    took[name].append((time.perf_counter() - begun) * 1000)
        for caller in callers.values():
            await caller.close()
    print(f"\nglobal limits, latency: {SEQUENTIAL} requests of each kind in turn, one at a time, ms")
    found = {name: statistics.quantiles(values, n=100) for name, values in took.items()}
    base = found["free"]
    for name, cuts in found.items():
        print(
            f"  {name:<30} p50 {cuts[49]:6.2f}  p99 {cuts[98]:6.2f}   "
            f"added p50 {cuts[49] - base[49]:+6.2f}  p99 {cuts[98] - base[98]:+6.2f}"
        )
    added = found["per second"][49] - base[49]
    return [Target("a global limit adds, p50", added, 1.5, at_least=False, unit="ms")]


async def in_trouble() -> list[Target]:
    async with _fleet(4, FAIL_CLOSED) as made:
        load = Load(made, CLIENTS)
        async with load.running():
            await trouble(made, TROUBLE_S, random.Random(5))
    print(f"\nglobal limits, four gateways, {TROUBLE_S} s of kill -9 and SIGSTOP, refused while undecided")
    over = 0
    for finding in load.findings():
        print(f"  {finding}")
        over += max(0, finding.most - finding.limit)
    print(f"  answers: {', '.join(f'{code.name} {n}' for code, n in load.codes.most_common())}")
    async with _fleet(4, FAIL_CLOSED) as made:
        load = Load(made, CLIENTS)
        async with load.running():
            await asyncio.sleep(TROUBLE_S / 2)
    print(f"without trouble, {TROUBLE_S / 2:.0f} s")
    for finding in load.findings():
        print(f"  {finding}")
        over += max(0, finding.most - finding.limit)
    return [Target("requests beyond a limit in any window", over, 0, at_least=False, unit="")]


def _fleet(gateways: int, settings: dict[str, str]) -> AbstractAsyncContextManager[Fleet]:
    offsets = iter(range(OFFSET, OFFSET + 500, 20))
    state = Path(tempfile.mkdtemp(prefix="lingqu-limits-"))
    return fleet(state, lambda: next(offsets), [settings] * gateways)


async def _owned(made: Fleet, limits: dict[str, int]) -> tuple[str, str]:
    """Two clients with these limits: one whose shard the first gateway owns, and one whose it does not."""
    names = [f"client-{number}" for number in range(40)]
    owned: dict[bool, str] = {}
    first = made.gateways[0].limiter
    for name in names:
        owner = await made.owner(shard_of(name))
        if owner:
            owned.setdefault(owner == first, name)
    for name in owned.values():
        await made.limit(name, **limits)
    await asyncio.sleep(1.5)  # until all know, and shards that were taken are open
    return owned[True], owned[False]


def _decide(gateway: Gateway, client: str) -> None:
    request = rls_pb2.RateLimitRequest(domain="lingqu")
    descriptor = request.descriptors.add()
    for key, value in (("client", client), ("model", MODEL), ("type", "application/grpc")):
        descriptor.entries.add(key=key, value=value)
    raw = request.SerializeToString()
    with tempfile.NamedTemporaryFile(suffix=".grpc") as file:
        file.write(b"\0" + len(raw).to_bytes(4, "big") + raw)
        file.flush()
        done = subprocess.run(
            [
                "h2load", "-c", "4", "-m", "16", "-n", str(DECISIONS), "-d", file.name,
                "-H", "content-type: application/grpc", "-H", "te: trailers",
                f"http://{gateway.limiter}{METHOD}",
            ],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    assert f"{DECISIONS} succeeded" in done.stdout, done.stdout


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


MEASURES: dict[str, Callable[[], Awaitable[list[Target]]]] = {
    "decisions": decisions,
    "latency": latency,
    "trouble": in_trouble,
}


async def main(names: list[str]) -> int:
    targets = [target for name in names for target in await MEASURES[name]()]
    return judged(targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MEASURES)}; none: all")
    names = parser.parse_args().names or list(MEASURES)
    if unknown := set(names) - set(MEASURES):
        parser.error(f"there is no measure {', '.join(sorted(unknown))}")
    sys.exit(asyncio.run(main(names)))
