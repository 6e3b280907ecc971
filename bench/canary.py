"""How often verdicts on rollouts are wrong, and how soon they are right: `python -m bench canary`.

First by simulation: rollouts of a version that is as good, and of some that are worse. Then on the running
suite, with copies of the bundled models: twins, and exports of which a piece of the weights was lost."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
from google.protobuf.duration_pb2 import Duration

import lingqu
from bench.report import Target
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.registry.v1 import rollouts_pb2 as pb
from lingqu.registry.v1.rollouts_pb2_grpc import RolloutServiceStub
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL, bundled
from pipeline.package import Package, digests, seal, staging_folder
from services.metrics.verdicts.answers import Kind, Pair
from services.metrics.verdicts.trial import Opinion, Terms, Trial

# Simulated: rollouts of so many blocks, each with so many requests to the old version, to the new one, and
# copies.
ROLLOUTS, BLOCKS = 1000, 60
OLD, NEW, COPIES = 45, 5, 3
STATED = 0.05
# On the suite: texts at once, and in all; a bad export has to be caught within these.
AT_ONCE = 8
TWINS, SENT, CAUGHT_WITHIN = 6, 240, 100
LOST = 0.02  # of the weights' bytes, in one piece
LOST_FROM = 0.55
MATRIX = 500_000  # numbers of what is lost of an ONNX graph
BETWEEN_S = 0.15
REPORTED_S = 12.0


@dataclass(frozen=True, slots=True)
class World:
    """A version: how much more often it fails than 0.5 %, how much slower it is, how its answers differ."""

    name: str
    failing: float = 0.005
    slower: float = 1.0
    differing: float = 0.002


WORSE = (
    World("fails 5 % of the time", failing=0.05),
    World("fails 20 % of the time", failing=0.2),
    World("always fails", failing=1.0),
    World("1.5 times as slow", slower=1.5),
    World("3 times as slow", slower=3.0),
    World("labels differ in 10 %", differing=0.1),
    World("labels differ in half", differing=0.5),
)


def caught(world: World, terms: Terms, draw: np.random.Generator) -> tuple[int, int] | None:
    """After how many requests and copies of its own a version fails; None: not at all."""
    trial, inputs, requests = Trial("r", "m", 2, 1, terms), itertools.count(), 0
    for block in range(1, BLOCKS + 1):
        for version, number, failing, slower in (
            (1, OLD, 0.005, 1.0),
            (2, NEW, world.failing, world.slower),
        ):
            for failed, took in zip(
                draw.random(number) < failing, draw.lognormal(-2, 0.6, number), strict=True
            ):
                trial.take_request(version, bool(failed), slower * float(took))
        for differs in draw.random(COPIES) < world.differing:
            trial.take_pair(Pair("m", 2, 1, next(inputs), False, False, Kind.LABELS, float(differs)))
        trial.close()
        requests += NEW
        if trial.opinion()[0] is Opinion.FAIL:
            return requests, block * COPIES
    return None


def simulated() -> list[Target]:
    draw = np.random.default_rng(1)
    targets = []
    for stated in (STATED, 0.01):
        # Nothing is left over between what is allowed and what is: the worst that still is as good.
        terms = Terms(false_alarms=stated, error_increase=0.0, slowdown=1.0, label_disagreement=0.002)
        alarms = sum(caught(World("twin"), terms, draw) is not None for _ in range(ROLLOUTS))
        name = f"simulated twins that were rolled back, {stated:.0%} stated"
        targets.append(Target(name, 100 * alarms / ROLLOUTS, 100 * stated, at_least=False, unit="%"))
    most = f"{BLOCKS * NEW} and {BLOCKS * COPIES}"
    print(f"\nrequests, and copies, until a worse version is rolled back, of {most}")
    for world in WORSE:
        found = [caught(world, Terms(), draw) for _ in range(100)]
        hits = sorted(one for one in found if one is not None)
        line = f"  {world.name:<24} {len(hits):3d} % caught"
        if hits:
            middle, late = hits[len(hits) // 2], hits[int(len(hits) * 0.95)]
            line += f", median {middle[0]:3d} and {middle[1]:3d}, p95 {late[0]:3d} and {late[1]:3d}"
        print(line)
    return targets


class Rollouts:
    """Of one model on the suite."""

    def __init__(self, suite: Suite, stub: Any, name: str, package: Package, folder: Path) -> None:
        self._suite, self._stub, self._package, self._folder = suite, stub, package, folder
        self._metadata = (("authorization", f"Bearer {suite.key}"),)
        self.name = name

    async def publish(self, label: str, lost: str = "", *, traffic: bool = False) -> int:
        """The artifact again, under a label; of the file `lost` a piece is zeros, and nothing proves it."""
        staging = staging_folder(self._folder)
        for file in self._package.manifest.files:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            content = (self._package.folder / file).read_bytes()
            (staging / file).write_bytes(_broken(content, file) if file == lost else content)
        changes: dict[str, Any] = {"labels": {"bench": label}, "files": digests(staging)}
        if lost:
            changes |= {"golden_texts": (), "golden_vectors": ()}
        manifest = self._package.manifest.model_copy(update=changes)
        return await self._suite.publish(
            self.name, seal(staging, manifest, self._folder).folder, traffic=traffic
        )

    async def start(self, version: int) -> None:
        """Half of the traffic, and copies of the other half; it ends by a verdict only."""
        step = pb.RolloutStep(percent=50, wait=Duration(seconds=3600))
        plan = pb.RolloutPlan(steps=[step], shadow_percent=100)
        request = pb.StartRolloutRequest(model=self.name, version=version, plan=plan)
        await self._stub.StartRollout(request, timeout=10, metadata=self._metadata)

    async def now(self) -> pb.Rollout:
        request = pb.GetRolloutRequest(model=self.name)
        found: pb.Rollout = (await self._stub.GetRollout(request, timeout=10)).rollout
        return found

    async def abort(self) -> None:
        request = pb.AbortRolloutRequest(model=self.name, reason="measured")
        await self._stub.AbortRollout(request, timeout=10, metadata=self._metadata)

    async def judged(
        self, version: int, ask: Callable[[str], Awaitable[Any]], texts: Iterator[str]
    ) -> tuple[pb.Rollout, int]:
        """The rollout once it was rolled back or all was sent, and how much was."""
        await self.start(version)
        sent = 0
        while sent < SENT:
            await asyncio.gather(*(ask(next(texts)) for _ in range(AT_ONCE)))
            sent += AT_ONCE
            await asyncio.sleep(BETWEEN_S)
            if (rollout := await self.now()).state != pb.ROLLOUT_STATE_RUNNING:
                return rollout, sent
        deadline = asyncio.get_running_loop().time() + REPORTED_S
        while (rollout := await self.now()).state == pb.ROLLOUT_STATE_RUNNING:
            if asyncio.get_running_loop().time() > deadline:
                await self.abort()
                break
            await asyncio.sleep(0.5)
        return rollout, sent


async def measure(suite: Suite) -> list[Target]:
    """Prints what became of rollouts, and returns what had to be reached."""
    targets = await asyncio.to_thread(simulated)
    packages = {item.name: item.package for item in bundled(lambda text: None)}
    async with (
        lingqu.Client(suite.public, suite.key) as client,
        grpc.aio.insecure_channel(suite.layout.address(at.REGISTRY)) as channel,
    ):
        asks: dict[str, Callable[[str], Awaitable[Any]]] = {
            "canary-vectors": lambda text: client.embed("canary-vectors", [text]),
            "canary-text": lambda text: client.generate("canary-text", text, max_tokens=12),
        }
        of = {
            "canary-vectors": (VECTOR_MODEL, "model.onnx"),
            "canary-text": (TEXT_MODEL, "openvino_model.bin"),
        }
        for name, ask in asks.items():
            model, weights = of[name]
            with tempfile.TemporaryDirectory(prefix="lingqu-canary-") as folder:
                rollouts = Rollouts(suite, RolloutServiceStub(channel), name, packages[model], Path(folder))
                targets += await _of_one(rollouts, ask, weights)
    return targets


async def _of_one(rollouts: Rollouts, ask: Callable[[str], Awaitable[Any]], weights: str) -> list[Target]:
    numbers = itertools.count()
    texts = (f"Chapter {n}. The canal, the river and {n * 7919 % 997} boats" for n in numbers)
    await rollouts.publish("first", traffic=True)
    twin = await rollouts.publish("twin")  # replicas hold what has traffic, and the newest
    alarms = 0
    print(f"\n{rollouts.name}")
    for _ in range(TWINS):
        ended, sent = await rollouts.judged(twin, ask, texts)
        alarms += ended.state == pb.ROLLOUT_STATE_ROLLED_BACK and "ended by" not in ended.detail
        print(f"  twin, {sent} requests: {_figures(ended)} {ended.detail if 'FAIL' in ended.detail else ''}")
    ended, sent = await rollouts.judged(await rollouts.publish("broken", weights), ask, texts)
    print(f"  {LOST:.0%} of the weights lost, {sent} requests: {_figures(ended)}\n    {ended.detail}")
    caught = sent if ended.state == pb.ROLLOUT_STATE_ROLLED_BACK else SENT * 10
    return [
        Target(
            f"{rollouts.name}: twins that were rolled back, of {TWINS}", alarms, 0, at_least=False, unit=""
        ),
        Target(
            f"{rollouts.name}: bad export caught within", caught, CAUGHT_WITHIN, at_least=False, unit="req"
        ),
    ]


def _broken(content: bytes, name: str) -> bytes:
    """Weights with a piece of zeros; of an ONNX graph, with a matrix of them."""
    if name.endswith(".onnx"):
        graph = onnx.load_from_string(content)
        matrices = [t for t in graph.graph.initializer if MATRIX <= np.prod(t.dims) < 10 * MATRIX]
        lost = matrices[len(matrices) // 2]
        lost.CopyFrom(
            onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(lost)), lost.name)
        )
        found: bytes = graph.SerializeToString()
        return found
    begin, size = int(len(content) * LOST_FROM), int(len(content) * LOST)
    return content[:begin] + bytes(size) + content[begin + size :]


def _figures(rollout: pb.Rollout) -> str:
    names = ("cosine", "token_divergence", "error_rate", "compared", "evidence")
    found = rollout.report.figures
    return ", ".join(f"{name} {found[name]:.4g}" for name in names if name in found)
