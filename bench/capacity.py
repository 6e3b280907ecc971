"""What `lingqu capacity` predicts, against what happens: `python -m bench capacity`.

Requests of a text model come at random (Poisson, whatever becomes of the answers), with 16 to 64 tokens of
answer. The model is learnt at one load; its p50 and p95 at others are predicted, and then measured: in
rounds, since the speed of a machine drifts by more than what is looked for. Of a load there are the median of
what was predicted, and the percentiles of all requests that it had."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration

import lingqu
from bench.report import Target
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.metrics.v1 import capacity_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from pipeline.bundled import TEXT_MODEL

ROUNDS = 3
LEARNT, LEARN_S = 6.5, 18.0  # requests a second, and for how long: a prediction needs 100
# Below: of more at once than were seen only a bound is known. The rarer requests are, the longer; the rarest
# come last, since of the last seconds before something is learnt some are learnt, too.
PREDICTED = ((4.5, 12.0), (3.0, 12.0), (1.5, 16.0))
SETTLES_S = 12.0  # other models are still being loaded and proven when the suite is up
TOLD_S = 7.0  # inference tells every 5 s; the metrics service writes within one more
LENGTHS = (16, 24, 32, 48, 64)
MAX_ERROR = 0.35

Arrivals = list[tuple[float, int]]
"""When, in seconds from the start, and how many tokens at most."""


def arrivals(rate: float, seconds: float, seed: int) -> Arrivals:
    dice, found, now = random.Random(seed), [], 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        found.append((now, dice.choice(LENGTHS)))
    return found


async def load(client: lingqu.Client, asked: Arrivals, seed: int) -> list[float]:
    """Seconds that each took, in the order of their ends."""
    took = []

    async def ask(number: int, tokens: int) -> None:
        begun = time.perf_counter()
        prompt = f"Chapter {seed}.{number}. The old canal was known to everyone, and"
        await client.generate(TEXT_MODEL, prompt, max_tokens=tokens, no_cache=True)
        took.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, (due, tokens) in enumerate(asked):
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            tasks.create_task(ask(number, tokens))
    return took


async def measure(suite: Suite) -> list[Target]:
    """Prints what was predicted and measured, and returns what had to be reached."""
    async with (
        lingqu.Client(suite.public, suite.key) as client,
        grpc.aio.insecure_channel(suite.layout.address(at.METRICS)) as channel,
    ):
        stub: Any = MetricsServiceStub(channel)
        loads = {rate: Figures(rate) for rate, _ in ((LEARNT, LEARN_S), *PREDICTED)}
        await asyncio.sleep(SETTLES_S)
        await load(client, arrivals(LEARNT, 3.0, 0), 0)  # warms up
        for number in range(1, ROUNDS + 1):
            begun = time.perf_counter()
            loads[LEARNT].took += await load(client, arrivals(LEARNT, LEARN_S, number), number)
            await asyncio.sleep(TOLD_S)
            window = Duration(seconds=round(time.perf_counter() - begun))
            for figures in loads.values():
                request = pb.GetCapacityRequest(model=TEXT_MODEL, rps=figures.rate, window=window)
                figures.answers.append(await stub.GetCapacity(request, timeout=30))
            for other, (rate, seconds) in enumerate(PREDICTED, 1):
                seed = 10 * number + other
                loads[rate].took += await load(client, arrivals(rate, seconds, seed), seed)
    print(f"\ncapacity: {TEXT_MODEL}, {ROUNDS} rounds, each learnt from {LEARNT}/s over {LEARN_S:.0f} s")
    for number, answer in enumerate(loads[LEARNT].answers, 1):
        curve = ", ".join(f"{point.rate:.0f} at {point.concurrency:.1f}" for point in answer.curve)
        print(
            f"  round {number}, {answer.requests} requests of {answer.tokens:.0f} tokens; tokens/s: {curve}"
        )
    for figures in loads.values():
        for name, percentile in (("p50", 50), ("p95", 95)):
            print(figures.row(name, percentile))
    return [
        Target(
            f"p95 predicted of {figures.rate}/s, off by",
            abs(figures.error("p95", 95)),
            MAX_ERROR,
            at_least=False,
        )
        for figures in loads.values()
        if figures.rate != LEARNT
    ]


@dataclass(slots=True)
class Figures:
    """Of one load: what it was predicted to be, round by round, and the seconds that its requests took."""

    rate: float
    answers: list[Any] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def predicted_s(self, name: str) -> list[float]:
        """Endless where it was said to be overload."""
        found = (getattr(answer.latency, name) for answer in self.answers if answer.HasField("latency"))
        known = [value.seconds + value.nanos / 1e9 for value in found]
        return known + [math.inf] * (len(self.answers) - len(known))

    def error(self, name: str, percentile: float) -> float:
        """Relative to what was measured."""
        return statistics.median(self.predicted_s(name)) / float(np.percentile(self.took, percentile)) - 1

    def row(self, name: str, percentile: float) -> str:
        what = "learnt" if self.rate == LEARNT else "predicted"
        rounds = ", ".join(f"{value * 1000:.0f}" for value in self.predicted_s(name))
        share = self.answers[-1].utilization
        measured = float(np.percentile(self.took, percentile)) * 1000
        return (
            f"  {what:<9} {self.rate}/s, utilisation {share:4.0%}: {name} {rounds} ms, "
            f"measured {measured:.0f} ms (n={len(self.took)}), {self.error(name, percentile):+.0%}"
        )
