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

import lingqu
from bench.report import Target
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.metrics.v1 import metrics_pb2
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from pipeline.bundled import TEXT_MODEL
from services.metrics.capacity.advice import Advice, Asked, Measured, advise
from services.metrics.capacity.figures import measured
from services.metrics.points import labels
from services.metrics.queries import Query, Series

ROUNDS = 3
LEARNT = (6.5, 18.0)  # requests a second, and for how long: a prediction needs 100
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
    loads = [Figures(rate, seconds, place) for place, (rate, seconds) in enumerate((LEARNT, *PREDICTED))]
    rounds: list[Measured] = []
    async with lingqu.Client(suite.public, suite.key) as client:
        with grpc.insecure_channel(suite.layout.address(at.METRICS)) as channel:
            store: Any = Remote(MetricsServiceStub(channel))
            await asyncio.sleep(SETTLES_S)
            await load(client, arrivals(LEARNT[0], 3.0, 0), 0)  # warms up
            for number in range(1, ROUNDS + 1):
                begun = time.perf_counter()
                await loads[0].come(client, number)
                await asyncio.sleep(TOLD_S)
                window_s = time.perf_counter() - begun
                known = await asyncio.to_thread(measured, store, TEXT_MODEL, 0, window_s, time.time_ns())
                rounds.append(known)
                for figures in loads:
                    figures.advised.append(advise(known, Asked(figures.rate)))
                for figures in loads[1:]:
                    await figures.come(client, number)
    print(f"\ncapacity: {TEXT_MODEL}, {ROUNDS} rounds, each learnt anew from its first {LEARNT[1]:.0f} s")
    for number, known in enumerate(rounds, 1):
        points = sorted(known.points, key=lambda point: point.slots)
        curve = ", ".join(f"{point.rate:.0f} at {point.slots:.1f}" for point in points)
        learnt = f"{known.requests:.0f} requests of {known.tokens:.0f} tokens"
        print(f"  round {number}, {learnt}; tokens/s: {curve}")
    for figures in loads:
        for percentile in (50.0, 95.0):
            print(figures.row(percentile))
    return [
        Target(
            f"p95 predicted of {figures.rate:.1f}/s, off by",
            abs(figures.error(95.0)),
            MAX_ERROR,
            at_least=False,
        )
        for figures in loads[1:]
    ]


@dataclass(frozen=True, slots=True)
class Remote:
    """The store behind the metrics service: what is learnt of half a minute, GetCapacity does not tell."""

    stub: Any

    def query(self, query: Query) -> list[Series]:
        request = metrics_pb2.QueryRequest(
            measurement=query.measurement,
            field=query.field,
            filters=[
                metrics_pb2.Filter(label=label, values=values) for label, values in query.filters.items()
            ],
            aggregate=metrics_pb2.Aggregate.Value(f"AGGREGATE_{query.aggregate.name}"),
            percentile=query.percentile,
            group_by=query.group_by,
        )
        request.start_time.FromNanoseconds(query.start_ns)
        request.end_time.FromNanoseconds(query.end_ns)
        if query.window_ns:
            request.window.FromNanoseconds(query.window_ns)
        answer = self.stub.Query(request, timeout=30)
        return [
            Series(
                labels(dict(series.labels)),
                tuple((sample.time.ToNanoseconds(), sample.value) for sample in series.samples),
            )
            for series in answer.series
        ]


@dataclass(slots=True)
class Figures:
    """Of one load, in its `place` of a round: what it was predicted to be, round by round, and the seconds
    that its requests took. It is the same in each run."""

    nominal: float
    seconds: float
    place: int
    advised: list[Advice] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def asked(self, number: int) -> Arrivals:
        """In a round."""
        return arrivals(self.nominal, self.seconds, 10 * number + self.place)

    @property
    def rate(self) -> float:
        """What chance made of the nominal one."""
        came = sum(len(self.asked(number)) for number in range(1, ROUNDS + 1))
        return came / (ROUNDS * self.seconds)

    async def come(self, client: lingqu.Client, number: int) -> None:
        self.took += await load(client, self.asked(number), 10 * number + self.place)

    def predicted_s(self, percentile: float) -> list[float]:
        """Endless where it was said to be overload."""
        return [one.stay.of(percentile) if one.stay else math.inf for one in self.advised]

    def error(self, percentile: float) -> float:
        """Relative to what was measured."""
        truth = float(np.percentile(self.took, percentile))
        return statistics.median(self.predicted_s(percentile)) / truth - 1

    def row(self, percentile: float) -> str:
        what = "predicted" if self.place else "learnt"
        rounds = ", ".join(f"{value * 1000:.0f}" for value in self.predicted_s(percentile))
        share = statistics.median(one.utilization for one in self.advised)
        truth = float(np.percentile(self.took, percentile)) * 1000
        return (
            f"  {what:<9} {self.rate:.1f}/s, utilisation {share:4.0%}: p{percentile:.0f} {rounds} ms, "
            f"measured {truth:.0f} ms (n={len(self.took)}), {self.error(percentile):+.0%}"
        )
