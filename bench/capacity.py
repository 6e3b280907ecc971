"""What `lingqu capacity` predicts, against what happens: `python -m bench capacity`.

Requests of a text model come at random (Poisson, whatever becomes of the answers), with 16 to 64 tokens of
answer. The model is learnt at one load; its p50 and p95 at others are predicted, and then measured."""

from __future__ import annotations

import asyncio
import random
import time
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

LEARNT, LEARN_S = 6.0, 28.0  # requests a second, and for how long
PREDICTED = (1.5, 3.0, 4.5)  # below: of more at once than were seen only a bound is known
MEASURE_S = 20.0
SETTLES_S = 12.0  # other models are still being loaded and proven when the suite is up
TOLD_S = 8.0  # inference tells every 5 s; the metrics service writes within one more
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

        async def predicted(rate: float) -> Any:
            request = pb.GetCapacityRequest(model=TEXT_MODEL, rps=rate, window=Duration(seconds=60))
            return await stub.GetCapacity(request, timeout=30)

        await asyncio.sleep(SETTLES_S)
        await load(client, arrivals(LEARNT, 3.0, 0), 0)  # warms up
        first = arrivals(LEARNT, LEARN_S, 1)
        took = await load(client, first, 1)
        await asyncio.sleep(TOLD_S)
        learnt = await predicted(len(first) / LEARN_S)
        curve = ", ".join(f"{point.rate:.0f} at {point.concurrency:.1f}" for point in learnt.curve)
        print(
            f"\ncapacity: {TEXT_MODEL}, learnt from {learnt.requests} requests of {learnt.tokens:.0f} tokens"
        )
        print(f"  tokens/s by requests in progress: {curve}")
        _row(took, learnt, "learnt")
        others = [arrivals(rate, MEASURE_S, number + 2) for number, rate in enumerate(PREDICTED)]
        answers = [await predicted(len(other) / MEASURE_S) for other in others]
        errors = []
        for number, (other, answer) in enumerate(zip(others, answers, strict=True)):
            errors.append(_row(await load(client, other, number + 2), answer, "predicted"))
    return [Target("p95 predicted of loads not seen, off by at most", max(errors), MAX_ERROR, at_least=False)]


def _row(took: list[float], answer: Any, what: str) -> float:
    """Prints it, and returns how far the p95 is off, relative to the measured one."""
    if not answer.HasField("latency"):
        print(f"  {what:<9} {answer.rps:4.1f}/s: said to be overload, {answer.utilization:.0%}")
        return 1.0
    error = 0.0
    for name, percentile in (("p50", 50), ("p95", 95)):
        told, truth = getattr(answer.latency, name), float(np.percentile(took, percentile))
        said = told.seconds + told.nanos / 1e9
        error = said / truth - 1
        print(
            f"  {what:<9} {answer.rps:4.1f}/s, {len(took)} requests, utilisation {answer.utilization:4.0%}: "
            f"{name} {said * 1000:6.0f} ms, measured {truth * 1000:6.0f} ms, {error:+.0%}"
        )
    return abs(error)
