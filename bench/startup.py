"""From the command `lingqu up` to the first generated token, everything installed, the state folder new; and
from Ctrl-C until nothing is left."""

from __future__ import annotations

import time

import lingqu
from bench import suite
from bench.report import Target, row
from pipeline.bundled import TEXT_MODEL

PASSES = 3


async def measure(offset: int) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    seconds, stops = [], []
    for _ in range(PASSES):
        begun = time.perf_counter()
        async with suite.running(offset) as running, lingqu.Client(running.public, running.key) as client:
            async for _chunk in client.stream(TEXT_MODEL, "The canal", max_tokens=2):
                seconds.append(time.perf_counter() - begun)
                break
            begun = time.perf_counter()
        stops.append(time.perf_counter() - begun)
    print("\nstart: lingqu up to the first token, and Ctrl-C to the end")
    print(row("first token after", seconds, "s"))
    print(row("all ended after", stops, "s"))
    return [Target("lingqu up to the first token", max(seconds), 30.0, at_least=False, unit="s")]
