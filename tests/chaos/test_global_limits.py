"""Global limits while control planes, Envoys and etcd die, stop and come back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from pathlib import Path
from typing import Self

import grpc
import pytest

from bench.fleet import Caller, fleet
from bench.limit_load import Load, trouble
from tests.conftest import free_offset
from tests.waiting import pause, until

OK, AWAY = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
TIMEOUT_S = 0.1
CLIENTS = {
    "second": {"requests_per_second": 10},
    "minute": {"requests_per_minute": 120},
    "both": {"requests_per_second": 8, "requests_per_minute": 200},
}


def check(load: Load) -> None:
    for finding in load.findings():
        print(finding)  # noqa: T201 - pytest shows it when something failed
        assert finding.most <= finding.limit, str(finding)
        assert finding.passed > 0, str(finding)


async def passing(load: Load) -> None:
    """Wait until each gateway's requests are answered and some of them pass."""
    await until(lambda: load.codes[OK] > 10, "requests pass", every_s=0.02)


async def test_no_window_has_too_much_while_control_planes_die_and_stop(tmp_path: Path) -> None:
    """One is killed, one stops for longer than its session lives; the third takes their part over."""
    settings = {"LINGQU_LIMITS_FAIL": "closed", "LINGQU_LIMITS_LEASE_S": "2"}
    async with fleet(tmp_path, free_offset, [settings] * 3) as made:
        load = Load(made, CLIENTS)
        async with load.running():
            await passing(load)
            await made.gateways[0].control.kill()
            made.gateways[1].control.signal(signal.SIGSTOP)
            await pause(4.0, "its session ends, and another takes its part over")
            made.gateways[1].control.signal(signal.SIGCONT)
            await pause(1.0, "it could believe that its part is still its own")
        check(load)


async def test_a_control_plane_that_is_cut_off_stops_deciding_and_others_decide_for_its_envoy(
    tmp_path: Path,
) -> None:
    """Its Envoy still reaches it, and it its Envoy; only the registry is behind a connection that is cut."""
    settings = {
        "LINGQU_LIMITS_FAIL": "closed",
        "LINGQU_LIMITS_LEASE_S": "2",
        "LINGQU_LIMITS_TIMEOUT_S": "0.3",
    }
    async with Wire() as wire:
        cut_off = {**settings, "LINGQU_REGISTRY": wire.address}
        async with fleet(tmp_path, free_offset, [cut_off, settings], wired=wire.to) as made:
            load = Load(made, CLIENTS)
            async with load.running():
                await passing(load)
                wire.cut()
                await pause(3.5, "its session ends, and the other takes its part over")
                load.codes.clear()
                await pause(1.5, "what is answered from then on")
                late = dict(load.codes)
            check(load)
            assert late[OK] > 0
            assert late.get(AWAY, 0) < 0.1 * sum(late.values()), late


class Wire:
    """A TCP connection to somewhere else, which from `cut` on takes everything and passes nothing on."""

    def __init__(self) -> None:
        self._target = ""
        self._cut = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def to(self, target: str) -> None:
        self._target = target

    def cut(self) -> None:
        self._cut = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not self._cut:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_four_gateways_with_random_kills_and_partitions(tmp_path: Path, seed: int) -> None:
    """Three minutes of kill -9 of control planes and Envoys, and of control planes that stop and go on."""
    async with fleet(tmp_path, free_offset, [{"LINGQU_LIMITS_FAIL": "closed"}] * 4) as made:
        load = Load(made, CLIENTS)
        async with load.running():
            await trouble(made, 180, random.Random(seed))
        check(load)


async def test_the_choice_applies_in_time_when_nobody_decides(tmp_path: Path) -> None:
    """etcd is killed: nothing hangs, and sessions end by the owners' own clocks. Then the control planes."""
    common = {"LINGQU_LIMITS_TIMEOUT_S": str(TIMEOUT_S), "LINGQU_LIMITS_LEASE_S": "2"}
    choices = {"open": OK, "closed": AWAY}
    settings = [{**common, "LINGQU_LIMITS_FAIL": choice} for choice in choices]
    limits = {"second": {"requests_per_second": 1000}, "minute": {"requests_per_minute": 60_000}}
    async with fleet(tmp_path, free_offset, settings) as made:
        async with Load(made, limits).running():
            pass
        callers = [Caller(made, gateway, client) for client in limits for gateway in made.gateways]

        async def answers(*expected: grpc.StatusCode, limited: bool) -> bool:
            begun = time.monotonic()
            codes = await asyncio.gather(*(caller.ask() for caller in callers))
            assert time.monotonic() - begun < TIMEOUT_S + 1.0
            told = ["x-ratelimit-limit" in caller.metadata for caller in callers]
            return codes == [*expected] * 2 and told == [limited] * len(callers)

        await until(lambda: answers(OK, OK, limited=True), "limits are kept")
        await made.etcd.kill()
        await until(lambda: answers(*choices.values(), limited=False), "the choices apply")
        await made.etcd.start()
        await until(lambda: answers(OK, OK, limited=True), "limits are kept again")
        for gateway in made.gateways:
            await gateway.control.kill()
        await until(lambda: answers(*choices.values(), limited=False), "the choices apply again")
