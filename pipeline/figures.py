"""Figures of a training, on their way to the collector while it runs.

    with TrainingFigures(model, run="tiny-3") as figures:
        for batch in batches:
            loss = …
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            figures.step(loss, items=batch.numel(), learning_rate=rate, gradient_norm=norm)

What is told, by OTLP, as measurement `training` with the label run: `loss` and `gradient_norm` (the mean and
the greatest since the last time), `learning_rate`, `throughput` (items a second), `step`, `nonfinite` (losses
and norms that were no finite numbers) and `dropped` (records that could not be told). And as
`training.layers` with the labels run and layer: what the parameters look like (distributions.py).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from pipeline.distributions import MAX_LAYERS, distribution, layers
from pipeline.exports import MAX_QUEUED, Exports, Record, Trust

log = logging.getLogger(__name__)

TRAINING, LAYERS = "lingqu.training", "lingqu.training.layers"
ENDPOINT = "http://127.0.0.1:4318"
SHARE = 0.02
"""Of the time of a training, at most so much goes into looking at its parameters."""

MAX_STEPS = 1_000
"""Steps that are told together."""

Number = Any
"""A number, or a tensor with one."""


class TrainingFigures:
    """For one thread, that of the training; in distributed ones for that of one rank. Whatever happens here,
    the training goes on: what cannot be measured is logged once, what cannot be told is counted."""

    def __init__(
        self,
        model: torch.nn.Module,
        run: str,
        endpoint: str = ENDPOINT,
        *,
        every_s: float = 1.0,
        layers_every_s: float = 30.0,
        most_layers: int = MAX_LAYERS,
        most_queued: int = MAX_QUEUED,
        trust: Trust | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_s`: steps that take less are told together. `layers_every_s`: how often parameters are
        looked at, less often where that would take more than SHARE of the time. `trust`: for an endpoint that
        is https. Raises ValueError for an empty run."""
        if not run:
            raise ValueError("run: is required")
        self._model, self._most_layers, self._clock = model, most_layers, clock
        self._every_s, self._layers_every_s = every_s, layers_every_s
        self._labels = {"run": run}
        self._exports = Exports(endpoint, f"{TRAINING}.dropped", self._labels, most_queued, trust)
        self._losses: list[Number] = []
        self._norms: list[Number] = []
        self._items = 0.0
        self._learning_rate: float | None = None
        self._steps = 0
        self._since = self._due = self._layers_due = 0.0
        self._failed = False

    def __enter__(self) -> Self:
        self._exports.__enter__()
        self._since = self._due = self._layers_due = self._clock()  # the first step is told at once
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tells the rest and how the parameters are at the end, which takes up to five seconds where the
        collector is away."""
        if self._losses:
            self._guarded(self._tell, self._clock())
        self._guarded(self._tell_layers)
        self._exports.__exit__(kind, err, trace)

    @property
    def dropped(self) -> int:
        """Records that the collector will not get."""
        return self._exports.dropped

    def step(
        self,
        loss: Number,
        *,
        items: float = 0,
        learning_rate: float | None = None,
        gradient_norm: Number = None,
    ) -> None:
        """One step of the optimizer was made. `items`: the tokens or samples in it. Without `gradient_norm`
        it is that of the gradients which the model has now, looked at once every `every_s`. Tensors may stay
        on their device: they are not waited for before a record is due."""
        self._guarded(self._step, loss, items, learning_rate, gradient_norm)

    def _step(self, loss: Number, items: float, learning_rate: float | None, norm: Number) -> None:
        self._steps += 1
        self._items += items
        self._learning_rate = learning_rate
        self._losses.append(_detached(loss))
        if norm is not None:
            self._norms.append(_detached(norm))
        now = self._clock()
        if now >= self._due or len(self._losses) >= MAX_STEPS:
            if norm is None:
                self._norms.append(_norm(self._model))
            self._tell(now)
        if now >= self._layers_due:
            self._layers_due = now + self._layers_every_s
            self._tell_layers()
            self._layers_due = max(self._layers_due, now + (self._clock() - now) / SHARE)

    def _tell(self, now: float) -> None:
        since, self._since, self._due = self._since, now, now + self._every_s
        losses, norms, items = _numbers(self._losses), _numbers(self._norms), self._items
        self._forget()
        gauges = {"step": float(self._steps)}
        gauges["nonfinite"] = float(sum(not math.isfinite(value) for value in (*losses, *norms)))
        if finite := [value for value in losses if math.isfinite(value)]:
            gauges["loss"] = math.fsum(finite) / len(finite)
        if finite := [value for value in norms if math.isfinite(value)]:
            gauges["gradient_norm"] = max(finite)
        if self._learning_rate is not None:
            gauges["learning_rate"] = float(self._learning_rate)
        if items and now > since:
            gauges["throughput"] = items / (now - since)
        self._offer(TRAINING, gauges, self._labels)

    def _forget(self) -> None:
        self._losses, self._norms, self._items = [], [], 0.0

    def _tell_layers(self) -> None:
        for name, tensors in layers(self._model.named_parameters(), self._most_layers).items():
            if found := distribution(tensors):
                self._offer(LAYERS, found, {**self._labels, "layer": name})

    def _offer(self, family: str, gauges: dict[str, float], labels: dict[str, str]) -> None:
        named = {f"{family}.{name}": value for name, value in gauges.items() if math.isfinite(value)}
        self._exports.offer(Record(named, labels, time.time_ns()))

    def _guarded(self, measure: Callable[..., None], *given: Any) -> None:
        try:
            measure(*given)
        except Exception:  # a training of days is not to end because of a figure
            self._forget()
            if not self._failed:
                self._failed = True
                log.exception("a figure of the training cannot be measured; this is said once")


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, torch.Tensor) else float(value)


def _numbers(values: list[Number]) -> list[float]:
    """Tensors of one device are fetched together."""
    tensors = [value.reshape(()).double() for value in values if isinstance(value, torch.Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]


def _norm(model: torch.nn.Module) -> float | torch.Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else 0.0
