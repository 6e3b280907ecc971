"""Figures of a small training, in a real collector, and a training whose collector is not there."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from pipeline import exports
from pipeline.figures import TrainingFigures
from services.metrics.app import MetricsSettings
from services.metrics.app import running as service_running
from tests.conftest import free_offset
from tests.waiting import until

VOCABULARY, WIDTH, LENGTH = 50, 16, 8


class Tiny(torch.nn.Module):
    """A language model of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        block = torch.nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
        self.blocks = torch.nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))  # type: ignore[no-any-return]


class Told(list[tuple[float, float]]):
    """Loss and gradient norm of each step."""


def train(model: Tiny, figures: TrainingFigures, steps: int, after: Callable[[], Any] = lambda: None) -> Told:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = Told()
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (4, LENGTH))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures.step(loss, items=tokens.numel(), learning_rate=1e-2, gradient_norm=norm)
        told.append((loss.item(), norm.item()))
        after()
    return told


class Collector:
    """A metrics service with a DuckDB of its own, not running at first."""

    def __init__(self, folder: Path) -> None:
        layout = Layout(folder, free_offset())
        self.cfg = MetricsSettings(
            metrics_listen=layout.address(at.METRICS),
            metrics_http_listen=layout.address(at.METRICS_HTTP),
            metrics_folder=folder,
            grace_s=0.5,
        )
        self.url = f"http://{self.cfg.metrics_http_listen}"

    async def asked(
        self, field: str, aggregate: str, measurement: str = "training", **by: Any
    ) -> dict[str, float]:
        """By the last label of the group; "" for what is not grouped."""
        request = pb.QueryRequest(
            measurement=measurement, field=field, aggregate=f"AGGREGATE_{aggregate}".upper(), **by
        )
        async with grpc.aio.insecure_channel(self.cfg.metrics_listen) as channel:
            stub: Any = MetricsServiceStub(channel)
            answer = await stub.Query(request, timeout=5)
        return {next(iter(series.labels.values()), ""): series.samples[0].value for series in answer.series}


@pytest.fixture
async def collector(tmp_path: Path) -> AsyncIterator[Collector]:
    made = Collector(tmp_path)
    async with service_running(made.cfg):
        yield made


async def test_what_a_training_did_can_be_asked(collector: Collector) -> None:
    model = Tiny()

    def trained() -> Told:
        with TrainingFigures(model, "tiny-1", collector.url, every_s=0.0, layers_every_s=0.0) as figures:
            told = train(model, figures, 6)
        assert figures.dropped == 0
        return told

    told = await asyncio.to_thread(trained)
    losses, norms = zip(*told, strict=True)
    assert await collector.asked("loss", "mean", group_by=["run"]) == {
        "tiny-1": pytest.approx(sum(losses) / 6, rel=1e-6)
    }
    assert (await collector.asked("gradient_norm", "max"))[""] == pytest.approx(max(norms), rel=1e-5)
    assert await collector.asked("learning_rate", "last") == {"": 1e-2}
    assert await collector.asked("step", "last") == {"": 6.0}
    assert (await collector.asked("throughput", "min"))[""] > 0
    assert await collector.asked("nonfinite", "sum") == {"": 0.0}
    for field, expected in (("mean", torch.mean), ("max", torch.amax)):
        found = await collector.asked(field, "last", "training.layers", group_by=["layer"])
        assert found == {
            name: pytest.approx(float(expected(tensor.detach())), rel=1e-4, abs=1e-6)
            for name, tensor in model.named_parameters()
        }


async def test_a_loss_that_is_no_number_is_told_as_such(collector: Collector) -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
        model.bias.zero_()

    def trained() -> None:
        with TrainingFigures(model, "broken", collector.url) as figures:
            figures.step(torch.tensor(math.nan), gradient_norm=math.inf)
            figures.step(2.0, gradient_norm=1.0)

    await asyncio.to_thread(trained)
    assert await collector.asked("nonfinite", "sum") == {"": 2.0}
    assert await collector.asked("loss", "mean") == {"": 2.0}
    assert await collector.asked("nans", "max", "training.layers", group_by=["layer"]) == {
        "weight": 0.25, "bias": 0.0
    }  # fmt: skip
    assert (await collector.asked("zeros", "max", "training.layers", group_by=["layer"]))["bias"] == 1.0


async def test_a_training_goes_on_without_its_collector(tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing waits; the newest figures are kept, and the number of those that were not is told later."""
    monkeypatch.setattr(exports, "AT_ONCE", 5)
    collector, there, asked = Collector(tmp_path), threading.Event(), threading.Event()

    def trained() -> TrainingFigures:
        model = torch.nn.Linear(2, 2)
        with TrainingFigures(model, "alone", collector.url, every_s=0.0, most_queued=10) as figures:
            slowest = 0.0
            for number in range(40):
                began = time.perf_counter()
                figures.step(float(number))
                slowest = max(slowest, time.perf_counter() - began)
            assert slowest < 1.0
            assert figures.dropped >= 40 - 10 - 5
            there.set()
            assert asked.wait(10)
        return figures

    training = asyncio.create_task(asyncio.to_thread(trained))
    await asyncio.to_thread(there.wait, 10)
    async with service_running(collector.cfg):

        async def told() -> bool:
            return await collector.asked("step", "last") == {"": 40.0}

        await until(told, "figures come when the collector is there", every_s=0.1)
        asked.set()
        figures = await training
        assert await collector.asked("dropped", "sum") == {"": float(figures.dropped)}


def test_a_collector_that_never_answers_does_not_hold_up_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(exports, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(exports, "CLOSE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with TrainingFigures(torch.nn.Linear(2, 2), "stuck", url, layers_every_s=1e9) as figures:
            figures.step(1.0)
            began = time.monotonic()
        assert time.monotonic() - began < 2.0
        assert figures.dropped == 5


async def test_what_is_refused_for_good_is_not_sent_again(collector: Collector) -> None:
    def trained() -> TrainingFigures:
        with TrainingFigures(torch.nn.Linear(2, 2), "lost", f"{collector.url}/elsewhere") as figures:
            figures.step(1.0)
        return figures

    assert (await asyncio.to_thread(trained)).dropped == 5


def test_what_cannot_be_measured_ends_no_training(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(exports, "CLOSE_S", 0.1)
    with TrainingFigures(torch.nn.Linear(2, 2), "odd", "http://127.0.0.1:1", most_queued=1) as figures:
        for _ in range(3):
            figures.step("no number")
    assert [record.message for record in caplog.records if record.exc_info] == [
        "a figure of the training cannot be measured; this is said once"
    ]


def test_looking_at_layers_has_a_bounded_share_of_the_time(monkeypatch: Any) -> None:
    """A look takes a second by this clock: 50 pass before the next."""
    monkeypatch.setattr(exports, "CLOSE_S", 0.1)
    now, looks = 0.0, 0

    class Slow(torch.nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            nonlocal now, looks
            now, looks = now + 1.0, looks + 1
            return iter(())

    with TrainingFigures(
        Slow(), "slow", "http://127.0.0.1:1", layers_every_s=0.0, clock=lambda: now
    ) as figures:
        for _ in range(200):
            now += 1.0
            figures.step(1.0, gradient_norm=1.0)
    assert 4 <= looks <= 6
