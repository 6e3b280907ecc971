"""What a call and a message cost the inference service's gRPC server, and grpcio's: the same handlers, which
do nothing, and a client that takes little."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from bench.http2 import GrpcConnection
from bench.report import Target, ratio, row
from bench.rpc_server import SERVICE

ROUNDS = 7
CALLS = 2_000  # echoes of a round
AT_ONCE = (1, 8, 64)
STREAMS = (1, 8, 32)
BODY = b"x" * 100
MOST_CALL, MOST_MESSAGE = 0.9, 0.7  # of grpcio's processor time, with eight at once
KINDS = {"own": "in the event loop", "grpcio": "grpcio's"}


class Calls(GrpcConnection):
    """Calls of one method on one connection."""

    def begin(self, at_once: int, calls: int) -> asyncio.Future[None]:
        """Done when all of them have ended, of which so many are in progress at a time."""
        self._todo, self._left, self.messages = calls - at_once, calls, 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for _ in range(at_once):
            self.call(BODY)
        return self._done

    def message(self, at: float, stream: int, message: bytes) -> None:
        self.messages += 1

    def ended(self, at: float, stream: int, well: bool) -> None:
        if self._done.done():
            return
        if not well:
            self._done.set_exception(ConnectionError(f"stream {stream} ended early"))
            return
        self._left -= 1
        if not self._left:
            self._done.set_result(None)
        elif self._todo:
            self._todo -= 1
            self.call(BODY)


class Server:
    def __init__(self, kind: str) -> None:
        argv = [sys.executable, "-m", "bench.rpc_server", kind]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def microseconds(self) -> float:
        """Of a processor, of all threads so far."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1000

    async def connected(self, method: str) -> Calls:
        loop = asyncio.get_running_loop()
        make = lambda: Calls(f"/{SERVICE}/{method}", "bench")  # noqa: E731
        _, connection = await loop.create_connection(make, "127.0.0.1", self.port)
        return connection

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


async def measure(offset: int) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    servers = {kind: Server(kind) for kind in KINDS}
    try:
        echoes = {kind: await server.connected("Echo") for kind, server in servers.items()}
        words = {kind: await server.connected("Words") for kind, server in servers.items()}
        await asyncio.sleep(0.1)  # settings of both sides have come
        print(f"\ngRPC servers: processor time, {ROUNDS} rounds in turn, one connection")
        unary = {n: await _compared(servers, echoes, n, CALLS) for n in AT_ONCE}
        streamed = {n: await _compared(servers, words, n, n) for n in STREAMS}
    finally:
        for server in servers.values():
            server.close()
    targets = []
    for what, found, most in (
        ("an echo, {} at once", unary, MOST_CALL),
        ("a message, {} streams", streamed, MOST_MESSAGE),
    ):
        for number, spent in found.items():
            for kind, values in spent.items():
                print(row(f"{what.format(number)}, {KINDS[kind]}", values, "µs"))
        share = ratio(found[8]["own"], found[8]["grpcio"])
        targets.append(Target(f"{what.format(8)}, ÷ grpcio's server", share, most, at_least=False))
    return targets


async def _compared(
    servers: dict[str, Server], connections: dict[str, Calls], at_once: int, calls: int
) -> dict[str, list[float]]:
    """Microseconds a message, by rounds."""
    spent: dict[str, list[float]] = {kind: [] for kind in servers}
    for number in range(ROUNDS + 1):
        for kind, connection in connections.items():
            before = servers[kind].microseconds
            await asyncio.wait_for(connection.begin(at_once, calls), 60)
            if number:  # the first round warms up
                spent[kind].append((servers[kind].microseconds - before) / connection.messages)
    return spent
