"""Encoders in a real Triton, without the rest of a suite: batching, its queue, deadlines, and what is
computed."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import triton_server
from pipeline.bundled import VECTOR_MODEL
from services.core.discovery import VersionKey
from services.core.errors import DeadlinePassed, InvalidInput, QueueFull
from services.inference.artifact import Manifest
from services.inference.callers import Priority
from services.inference.encoder import Budget, Row, Truncation
from services.inference.repository import MAX_QUEUE, Repository
from services.inference.triton import Triton
from services.inference.vectors import VectorModel
from tests.conftest import free_offset, show_logs
from tests.waiting import until

LONG = "word " * 300


@dataclass
class Served:
    layout: Layout
    triton: Triton
    repository: Repository
    vectors: Path

    def model(self, cache_bytes: int = 1 << 20) -> VectorModel:
        """A view of the loaded vector model with a cache of its own."""
        spec = Manifest.read(self.vectors).vector
        assert spec is not None
        return VectorModel(VersionKey(VECTOR_MODEL, 1), spec, self.vectors, self.triton, cache_bytes)

    def counted(self) -> Counter[str]:
        """What the encoders' counters say: runs, rows, tokens, padding."""
        url = f"http://{self.layout.address(at.TRITON_METRICS)}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found: Counter[str] = Counter()
        for line in lines:
            if line.startswith("lingqu_encoder_"):
                name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
                found[name.removeprefix("lingqu_encoder_").removesuffix("_total")] += int(float(value))
        return found


@pytest.fixture(scope="module")
async def served(
    tmp_path_factory: pytest.TempPathFactory, artifacts: dict[str, Path]
) -> AsyncIterator[Served]:
    layout = Layout(tmp_path_factory.mktemp("triton"), free_offset())
    running = await Running.start(triton_server(layout), layout.logs)
    triton = Triton(layout.address(at.TRITON_GRPC))
    try:
        await running.until_ready()
        repository = Repository(layout.state / "triton" / "models", {"otlp_endpoint": ""})
        folder = artifacts[VECTOR_MODEL]
        repository.add(VersionKey(VECTOR_MODEL, 1), folder, Manifest.read(folder))
        await triton.load(VECTOR_MODEL)
        yield Served(layout, triton, repository, folder)
    finally:
        await triton.close()
        await running.stop()
        show_logs(layout)


async def emptied(model: VectorModel) -> None:
    """What was given up holds its place in Triton's queue until the batch that runs is over."""

    async def answered() -> bool:
        try:
            await model.embed(["the last one"])
        except QueueFull:
            return False
        return True

    await until(answered, "the queue is empty", 30)


async def test_the_same_text_is_computed_once(served: Served) -> None:
    model = served.model()
    first = await model.embed(["a canal", "a river", "a canal"])
    before = served.counted()["rows"]
    again = await model.embed(["a river", "a canal"])
    assert served.counted()["rows"] == before
    assert np.array_equal(again.values, first.values[[1, 0]])
    assert np.array_equal(first.values[0], first.values[2])
    assert (model.cache.hits, model.cache.misses) == (2, 2)
    assert again.tokens == 8


async def test_another_version_does_not_answer_from_it(served: Served) -> None:
    """What is loaded anew has a cache of its own: its golden examples are computed."""
    await served.model().embed(["a text of two versions"])
    before = served.counted()["rows"]
    await served.model().embed(["a text of two versions"])
    assert served.counted()["rows"] == before + 1


async def test_texts_of_different_lengths_share_runs_and_little_is_padded(served: Served) -> None:
    before = served.counted()
    model = served.model(cache_bytes=0)
    texts = [f"{'word ' * (n * 7 % 60)}{n}" for n in range(200)]
    answers = await asyncio.gather(*(model.embed([text]) for text in texts))
    counted = served.counted() - before
    assert counted["rows"] == len(texts)
    assert counted["runs"] < len(texts) / 3
    assert counted["padding"] < 0.25 * counted["tokens"]
    whole = await model.embed(texts)
    for answer, row in zip(answers, whole.values, strict=True):
        assert float(answer.values[0] @ row) > 0.9999


async def test_texts_that_fill_a_request_are_those_of_like_length(served: Served) -> None:
    before = served.counted()
    texts = [f"{n} {LONG if n % 64 == 0 else 'short'}" for n in range(512)]
    vectors = await served.model(cache_bytes=0).embed(texts)
    counted = served.counted() - before
    assert counted["padding"] < 0.25 * counted["tokens"]
    assert counted["tokens"] < 1.3 * vectors.tokens


@pytest.mark.parametrize("truncation", [Truncation.END, Truncation.START])
async def test_what_is_cut_off_is_as_if_it_were_not_there(served: Served, truncation: Truncation) -> None:
    model = served.model()
    begin, end = "zebra " * 254, "yacht " * 254
    kept = begin if truncation is Truncation.END else end
    cut, alone = await model.embed([begin + end], truncation=truncation), await model.embed([kept])
    assert np.allclose(cut.values, alone.values, atol=1e-5)
    assert cut.tokens == 256


async def test_a_text_too_long_is_named_with_its_length(served: Served) -> None:
    model = served.model()
    with pytest.raises(InvalidInput, match="302 tokens") as caught:
        await model.embed(["short", LONG], truncation=Truncation.REFUSE)
    assert caught.value.field == "inputs[1]"
    fits = await model.embed(["word " * 254], truncation=Truncation.REFUSE)
    assert fits.tokens == 256


async def test_tritons_queue_is_bounded_and_goes_by_priority(served: Served) -> None:
    """What does not fit is refused at once; the urgent overtakes what waits."""
    model = served.model(cache_bytes=0)
    row = Row(list(range(1000, 1064)))
    order: list[str] = []

    async def one(name: str, priority: Priority) -> str:
        try:
            await model.compute([row], Budget.of(60, priority))
        except QueueFull:
            return "full"
        order.append(name)
        return "done"

    normal = [asyncio.create_task(one("normal", Priority.NORMAL)) for _ in range(MAX_QUEUE + 200)]
    done, _ = await asyncio.wait(normal, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    urgent = asyncio.create_task(one("urgent", Priority.INTERACTIVE))
    assert await asyncio.wait_for(urgent, 60) == "done"
    waiting = [task for task in normal if not task.done()]
    refused = [task for task in normal if task.done() and task.result() == "full"]
    assert len(waiting) > MAX_QUEUE / 4  # they were there before it
    assert 0 < len(refused) < 200
    for task in waiting:
        task.cancel()
    await asyncio.gather(*normal, return_exceptions=True)
    assert done
    await emptied(model)


async def test_a_deadline_bounds_the_queue_too_and_nothing_is_computed_for_it(served: Served) -> None:
    model = served.model(cache_bytes=0)
    row = Row(list(range(1000, 1064)))
    before = served.counted()["rows"]
    # Several full batches, which come first.
    busy = [asyncio.create_task(model.compute([row], Budget.of(60, Priority.NORMAL))) for _ in range(256)]
    await asyncio.wait(busy, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    begun = time.monotonic()
    late = [model.compute([row], Budget.of(0.05, Priority.NORMAL)) for _ in range(20)]
    answers = await asyncio.gather(*late, return_exceptions=True)
    assert time.monotonic() - begun < 1.0
    assert {type(answer) for answer in answers} == {DeadlinePassed}
    await asyncio.gather(*busy)
    assert served.counted()["rows"] - before == len(busy)


async def test_a_call_whose_time_is_up_does_not_begin(served: Served) -> None:
    with pytest.raises(DeadlinePassed):
        await served.model().embed(["x"], timeout=0.0)


async def test_a_call_that_is_given_up_leaves_the_queue(served: Served) -> None:
    model = served.model(cache_bytes=0)
    before = served.counted()["rows"]
    many = asyncio.create_task(model.embed([f"{n} {LONG}" for n in range(512)]))
    await until(lambda: served.counted()["rows"] > before, "some of it is computed", every_s=0.01)
    many.cancel()
    await asyncio.gather(many, return_exceptions=True)
    await model.embed(["the next one"], timeout=10)
    assert served.counted()["rows"] - before < 128


async def test_thousands_of_texts_leave_room_for_others(served: Served) -> None:
    """A call has two requests in Triton at once, so that a short one waits for no more than these."""
    model = served.model(cache_bytes=0)
    texts = [f"text {n} {'word ' * (n % 12)}" for n in range(2048)]
    before = served.counted()["rows"]
    many = asyncio.create_task(model.embed(texts))
    await until(lambda: served.counted()["rows"] > before, "some of it is computed", every_s=0.01)
    one = await model.embed(["a short question"])
    assert not many.done()
    assert one.values.shape == (1, 384)
    vectors = await many
    assert vectors.values.shape == (2048, 384)
    for n in (0, 1024, 2047):
        alone = await model.embed([texts[n]])
        assert float(alone.values[0] @ vectors.values[n]) > 0.9999
