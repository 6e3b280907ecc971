"""Streams in progress while the configuration changes all the time: none is cut while its replica lives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as oip

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.discovery import Model, Replica
from tests.dataplane import DataPlane, FakeReplica, dataplane, model, replicas
from tests.waiting import pause, until

STREAMS = 6


class Held:
    """A stream of text and one of tensors, told apart by what they were told first."""

    def __init__(self, plane: DataPlane, asked: str) -> None:
        self.plane = plane
        self.asked = asked
        self.heard = 0
        self.ended = ""
        self.leave = asyncio.Event()

    async def text(self) -> None:
        request = pb.GenerateRequest(model=self.asked, prompt="x")
        call = self.plane.text.StreamGenerate(request, metadata=self.plane.metadata)
        async for chunk in call:
            self.heard += 1
            self.ended = chunk.text

    async def tensors(self) -> None:
        async def requests() -> AsyncIterator[Any]:
            while not self.leave.is_set():
                yield oip.ModelInferRequest(model_name=self.asked)
                await pause(0.02, "the pace of a stream")

        call = self.plane.tensor.ModelStreamInfer(requests(), metadata=self.plane.metadata)
        async for answer in call:
            assert not answer.error_message
            self.heard += 1
        self.ended = "end"


def states(seed: int, hosts: list[FakeReplica]) -> tuple[list[Replica], list[Model]]:
    """Some state of the registry in which m has traffic somewhere: replicas, versions, weights, names and
    shadows come and go."""
    drawn = random.Random(seed)
    others = [f"other{n}" for n in range(drawn.randrange(6))]
    weights: dict[int, int] = drawn.choice([{1: 100}, {2: 100}, {1: 50, 2: 50}, {1: 90, 3: 10}])
    shadow = drawn.choice([0, *({1, 2, 3} - weights.keys())])
    models = [model("m", weights, 3, shadow=shadow, aliases={"stable": drawn.randrange(1, 4)})]
    models += [model(name, {1: 100}) for name in others]
    keys = [("m", n) for n in (1, 2, 3) if drawn.random() < 0.8] + [(name, 1) for name in others]
    alive = [host.hosting(*keys) for host in hosts if drawn.random() < 0.7]
    return alive, models


async def check_streams(folder: Path, pushes: int) -> None:
    async with replicas("one", "two", "three") as hosts, dataplane(folder) as plane:
        start = [host.hosting(("m", 1), ("m", 2), ("m", 3)) for host in hosts]
        await plane.publish(start, [model("m", {1: 60, 2: 40}, 3)])
        held = [Held(plane, name) for name in ["m"] * STREAMS + ["m@3"] * 2]
        tasks = [asyncio.create_task(kind()) for h in held for kind in (h.text, h.tensors)]
        try:
            await until(lambda: sum(host.streams for host in hosts) >= len(tasks), "all streams are open")
            for seed in range(pushes):
                await plane.publish(*states(seed, hosts))
                assert not any(task.done() for task in tasks), [t for t in tasks if t.done()]
            await plane.publish([], [])  # even when nothing is routed any more
            before = [h.heard for h in held]
            await until(lambda: all(h.heard > n + 4 for h, n in zip(held, before, strict=True)), "they go on")
            for host in hosts:
                host.release.set()
            for h in held:
                h.leave.set()
            await asyncio.wait_for(asyncio.gather(*tasks), 10)
            assert {h.ended for h in held} == {"end"}
        finally:
            for task in tasks:
                task.cancel()


async def test_no_stream_is_cut_by_a_push(tmp_path: Path) -> None:
    await check_streams(tmp_path, 20)


@pytest.mark.soak
async def test_no_stream_is_cut_by_five_hundred_pushes(tmp_path: Path) -> None:
    await check_streams(tmp_path, 500)
