"""A new version gets copies of real requests, and what it answers to them decides about it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

import lingqu
from bench.suite import Suite
from lingqu.cli.main import app
from pipeline.bundled import VECTOR_MODEL
from pipeline.package import Package, digests, seal, staging_folder
from services.inference.artifact import Manifest
from tests import checkpoints
from tests.waiting import until

JUDGED, TWINS = "judged", "twins"
MAX_REQUESTS = 400


@dataclass
class Rollouts:
    """What its users do: publish, send requests, look at rollouts."""

    suite: Suite
    client: lingqu.Client
    folder: Path

    async def publish(self, name: str, package: Package, *, traffic: bool, **changes: Any) -> int:
        """A copy of an artifact with another manifest."""
        staging = staging_folder(self.folder)
        for file in package.manifest.files:
            (staging / file).write_bytes((package.folder / file).read_bytes())
        manifest = package.manifest.model_copy(update={**changes, "files": digests(staging)})
        return await self.suite.publish(name, seal(staging, manifest, self.folder).folder, traffic=traffic)

    async def command(self, *arguments: str) -> Mapping[str, Any]:
        words = ["--state", str(self.suite.layout.state), "rollouts", *arguments, "--output", "json"]
        done = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert done.exit_code == 0, done.output
        found: Mapping[str, Any] = json.loads(done.output)
        return found

    async def ended(self, name: str, version: int, *plan: str) -> tuple[Mapping[str, Any], int]:
        """The rollout of a version once it is over, and how many texts were sent meanwhile."""
        await self.command("start", name, str(version), *plan)
        sent = itertools.count()
        texts = iter(sentences())

        async def over() -> Mapping[str, Any] | None:
            found = await self.command("show", name)
            if found["state"] != "ROLLOUT_STATE_RUNNING":
                return found
            if next(sent) < MAX_REQUESTS // 8:
                await asyncio.gather(*(self.ask(name, next(texts)) for _ in range(8)))
            return None

        found = await until(over, "the rollout is over", 40)
        assert found
        return found, next(sent) * 8

    async def ask(self, name: str, text: str) -> None:
        if name == JUDGED:
            await self.client.classify(name, [text])
        elif len(text) % 2:
            await self.client.embed(name, [text])
        else:
            await asyncio.to_thread(self._over_rest, name, text)

    def _over_rest(self, name: str, text: str) -> None:
        answer = httpx2.post(
            f"http://{self.suite.public}/v1/embeddings",
            json={"model": name, "input": text},
            headers={"authorization": f"Bearer {self.suite.key}"},
        )
        assert answer.status_code == 200


def sentences() -> list[str]:
    """No two alike."""
    words = [*checkpoints.GOOD, *checkpoints.BAD, *checkpoints.THINGS]
    drawn = random.Random(2)
    return [
        f"The {drawn.choice(words)} number {n} was {drawn.choice(words)}." for n in range(MAX_REQUESTS * 2)
    ]


@pytest.fixture
async def rollouts(suite: Suite, tmp_path: Path) -> AsyncIterator[Rollouts]:
    async with lingqu.Client(suite.public, suite.key) as client:
        yield Rollouts(suite, client, tmp_path)


async def test_an_export_with_its_labels_mixed_up_never_answers_anybody(
    rollouts: Rollouts, classifier: Package
) -> None:
    """It is proven against golden examples of its own, which are mixed up alike: only comparing tells."""
    spec = classifier.manifest.classifier
    assert spec is not None
    await rollouts.publish(JUDGED, classifier, traffic=True)
    mixed_up = spec.model_copy(update={"labels": tuple(reversed(spec.labels))})
    version = await rollouts.publish(JUDGED, classifier, traffic=False, classifier=mixed_up)
    plan = ("--shadow", "100", "--step", "0:60s", "--step", "10:60s")
    ended, sent = await rollouts.ended(JUDGED, version, *plan)
    assert ended["state"] == "ROLLOUT_STATE_ROLLED_BACK"
    assert "labels agree to 0.0%" in ended["detail"]
    assert ended.get("step", 0) == 0, "it had copies only"
    assert sent <= 200


async def test_a_twin_goes_all_the_way(rollouts: Rollouts, artifacts: dict[str, Path]) -> None:
    """Vectors over gRPC and over REST."""
    folder = artifacts[VECTOR_MODEL]
    package = Package(folder, folder.name, Manifest.read(folder))
    await rollouts.publish(TWINS, package, traffic=True)
    version = await rollouts.publish(TWINS, package, traffic=False, labels={"again": "yes"})
    plan = ("--shadow", "100", "--step", "0:0s", "--step", "50:0s", "--require-pass", "--judge", "least=30")
    ended, _ = await rollouts.ended(TWINS, version, *plan)
    assert ended["state"] == "ROLLOUT_STATE_SUCCEEDED", ended
    figures = ended["report"]["figures"]
    assert figures["cosine"] == pytest.approx(1, abs=1e-3)
    assert figures["compared"] >= 30
    assert figures["error_rate"] == 0
