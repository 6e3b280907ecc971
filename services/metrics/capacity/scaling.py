"""How many replicas a model should have, for KEDA: one number, of which each replica is for `target`.

What adds up over replicas (tokens in flight, waiting requests, utilisation) is told as it is. A time does
not: it is told times the replicas, so that Kubernetes, which divides by target, gets them in proportion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from services.core.errors import BackendUnavailable, InvalidInput, NotReady
from services.metrics.accesslog import REQUESTS
from services.metrics.capacity import figures
from services.metrics.capacity.advice import Asked, advise, replica
from services.metrics.capacity.figures import Reader, measured
from services.metrics.queries import Aggregate
from services.metrics.scrape import TRITON
from services.metrics.store import Store

LEARNT_S = 3600.0
FIELD = "scalerMetadata"
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Stale(BackendUnavailable):
    """The figures are too old to act on. Nothing is zero only because nobody told it."""

    reason = "STALE"
    retry_after_s = 10.0


class Unreachable(NotReady):
    """No number of replicas meets the objective."""

    reason = "UNREACHABLE"


class Metric(StrEnum):
    TOKENS_IN_FLIGHT = "tokens_in_flight"
    QUEUE_LENGTH = "queue_length"
    QUEUE_TIME = "queue_time"
    UTILIZATION = "utilization"
    PREDICTED = "predicted"


@dataclass(frozen=True, slots=True)
class Trigger:
    """`target` is of one replica: tokens, requests, seconds, share (0 to 1), or 1 for `predicted`. `within`:
    objectives of `predicted`, seconds by percentile. The model is active when more than `activation` requests
    came in the last `window_s` seconds, or some are in progress."""

    model: str
    version: str
    metric: Metric
    target: float
    window_s: float
    activation: float
    within: Mapping[float, float]

    @property
    def name(self) -> str:
        """Of the metric: what Kubernetes takes for one."""
        model = re.sub(r"[^a-z0-9-]+", "-", self.model.lower())[:60]
        return f"lingqu-{self.metric.value.replace('_', '-')}-{model}"


_KNOWN = (
    "scalerAddress",
    "model",
    "version",
    "metric",
    "target",
    "window",
    "activation",
    "p50",
    "p95",
    "p99",
)
_OF_KEDA = ("caCert", "tlsCertFile", "tlsClientCert", "tlsClientKey", "unsafeSsl", "enableTLS")


def trigger(metadata: Mapping[str, str]) -> Trigger:
    """Raises InvalidInput, naming the entry."""
    for name in metadata:
        if name not in (*_KNOWN, *_OF_KEDA):
            raise InvalidInput(f"{FIELD}.{name}", f"is unknown; there are {', '.join(_KNOWN[1:])}")
    model = metadata.get("model", "")
    if not model or len(model) > 200 or not model.isprintable():
        raise InvalidInput(f"{FIELD}.model", "is required: the name of a model")
    version = metadata.get("version", "")
    if version and not (version.isdecimal() and int(version) > 0):
        raise InvalidInput(f"{FIELD}.version", f'"{version}" is not like 3')
    try:
        metric = Metric(metadata.get("metric", ""))
    except ValueError:
        raise InvalidInput(f"{FIELD}.metric", f"is one of {', '.join(Metric)}") from None
    within = {
        float(name[1:]): _seconds(metadata, name, "") for name in ("p50", "p95", "p99") if name in metadata
    }
    if within and metric is not Metric.PREDICTED:
        raise InvalidInput(f"{FIELD}.p95", "objectives are for metric predicted")
    target = 1.0
    if metric is Metric.PREDICTED:
        if not within:
            raise InvalidInput(f"{FIELD}.p95", 'metric predicted needs an objective, like p95: "800ms"')
        if "target" in metadata:
            raise InvalidInput(f"{FIELD}.target", "metric predicted has none: it is the number of replicas")
    elif metric is Metric.QUEUE_TIME:
        target = _seconds(metadata, "target", "")
    else:
        target = _number(metadata, "target", "")
        if not target > 0:
            raise InvalidInput(f"{FIELD}.target", "is more than 0: how much a replica is for")
        if metric is Metric.UTILIZATION and target >= 1:
            raise InvalidInput(f"{FIELD}.target", "is a share below 1, like 0.7")
    window = _seconds(metadata, "window", "60s")
    if not 10 <= window <= 3600:
        raise InvalidInput(f"{FIELD}.window", "is from 10s to 1h")
    return Trigger(model, version, metric, target, window, _number(metadata, "activation", "0"), within)


def is_active(store: Store, asked: Trigger, now_ns: int) -> bool:
    """Whether anything came or is in progress. From what replicas say, and from what Envoy says where there
    are none: it sees those who ask in vain. Raises what Store.query raises."""
    read = Reader(store, asked.model, now_ns, asked.version)
    if read.now(figures.RUNNING)[0] > 0 or read.now(figures.QUEUE_LENGTH)[0] > 0:
        return True
    came = (read.sum(figures.ADMITTED, asked.window_s), read.sum(REQUESTS, asked.window_s))
    return max(came) > asked.activation


def value(store: Store, asked: Trigger, now_ns: int) -> float:
    """Over all replicas. Raises Stale, Unreachable, NotEnoughMeasured, ModelNotMeasured, and what Store.query
    raises."""
    if asked.metric in (Metric.PREDICTED, Metric.UTILIZATION):
        return _needed(store, asked, now_ns)
    read = Reader(store, asked.model, now_ns, asked.version)
    _, there = read.now(figures.SLOTS)
    if not there:
        raise Stale(
            f'no replica of "{asked.model}" has told of itself for {figures.STALE_S:.0f} s: see whether the '
            "model is known (`lingqu models list`) and its replicas know the metrics service (LINGQU_METRICS)"
        )
    if asked.metric is Metric.QUEUE_TIME:
        return there * _waits(read, asked.window_s)
    name = figures.QUEUE_LENGTH if asked.metric is Metric.QUEUE_LENGTH else figures.IN_FLIGHT
    return read.now(name)[0]


def _waits(read: Reader, window_s: float) -> float:
    """Mean seconds that requests waited, or that those who wait will at the pace of late (Little's law),
    whichever is more: who has not got a slot yet is in no mean."""
    admitted, (waiting, _) = read.sum(figures.ADMITTED, window_s), read.now(figures.QUEUE_LENGTH)
    if admitted <= 0:
        return window_s if waiting > 0 else 0.0
    return max(read.sum(figures.QUEUE_SECONDS, window_s) / admitted, waiting / (admitted / window_s))


def _needed(store: Store, asked: Trigger, now_ns: int) -> float:
    """Replicas that the load of late needs, or keeps busy all the time."""
    learnt = measured(store, asked.model, int(asked.version or 0), LEARNT_S, now_ns)
    if not learnt.replicas:
        raise Stale(f'the newest figure of "{asked.model}" is {learnt.age_s:.0f} s old')
    read = Reader(store, asked.model, now_ns, str(learnt.version))
    by_triton = not read(figures.SLOTS, Aggregate.LAST, figures.LATELY_S)
    came = (
        read.sum(TRITON, asked.window_s, "requests")
        if by_triton
        else read.sum(figures.ADMITTED, asked.window_s)
        + read.sum(f"{figures.INFERENCE}requests", asked.window_s, outcome=("refused",))
    )
    rate = came / asked.window_s
    if asked.metric is Metric.UTILIZATION:
        one, _ = replica(learnt)
        return rate / one.most
    found = advise(learnt, Asked(rate, learnt.replicas, asked.within))
    if not found.needed:
        alone = {percentile: found.alone.of(percentile) for percentile in asked.within}
        raise Unreachable(
            f'"{asked.model}" cannot meet {_said(asked.within)}: requests that meet no other have '
            f"{_said(alone)}"
        )
    return float(found.needed)


def _said(within: Mapping[float, float]) -> str:
    return ", ".join(f"p{percentile:g} {limit * 1000:.0f} ms" for percentile, limit in within.items())


def _number(metadata: Mapping[str, str], name: str, default: str) -> float:
    text = metadata.get(name, default)
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise InvalidInput(f"{FIELD}.{name}", f'"{text}" is no number from 0 on' if text else "is required")
    return found


def _seconds(metadata: Mapping[str, str], name: str, default: str) -> float:
    text = metadata.get(name, default)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if found is None or float(found[1]) <= 0:
        raise InvalidInput(
            f"{FIELD}.{name}", f'"{text}" is not like 800ms, 2s or 5m' if text else "is required"
        )
    return float(found[1]) * UNITS[found[2]]
