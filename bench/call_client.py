"""Unary calls by some callers at once, each sending its next request when it has the answer to the last.

`python -m bench.call_client` reads a JSON line for each measurement, {"address", "key", "path", "requests":
[base64], "callers", "seconds"}, and answers with {"rate", "ms": […]}: calls a second, and how long each took.
Callers go through the requests in turn. A call that fails ends the measurement.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import sys
import time
from typing import Any

import uvloop

from bench.http2 import GrpcConnection


class Callers(GrpcConnection):
    """All callers on one connection."""

    def __init__(self, asked: dict[str, Any]) -> None:
        super().__init__(asked["path"], asked["address"], {"authorization": f"Bearer {asked['key']}"})
        self._requests = itertools.cycle(base64.b64decode(one) for one in asked["requests"])
        self._begun: dict[int, float] = {}
        self._answered: set[int] = set()
        self._until = time.monotonic() + asked["seconds"]
        self.ms: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        at = time.monotonic()
        self._begun[self.call(next(self._requests))] = at

    def message(self, at: float, stream: int, message: bytes) -> None:
        self._answered.add(stream)

    def ended(self, at: float, stream: int, well: bool) -> None:
        if self.done.done():
            return
        if stream not in self._answered:
            self.done.set_exception(ConnectionError("a call failed"))
            return
        self._answered.discard(stream)
        self.ms.append((at - self._begun.pop(stream)) * 1000)
        if at < self._until:
            self.begin()
        elif not self._begun:
            self.done.set_result(None)


async def measure(asked: dict[str, Any]) -> dict[str, Any]:
    host, _, port = asked["address"].rpartition(":")
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Callers(asked), host, int(port)
    )
    await asyncio.sleep(0.05)  # settings of both sides have come
    begun = time.monotonic()
    for _ in range(asked["callers"]):
        connection.begin()
    await connection.done
    seconds = time.monotonic() - begun
    connection.close()
    return {"rate": len(connection.ms) / seconds, "ms": connection.ms}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(uvloop.run(measure(json.loads(line)))), flush=True)
