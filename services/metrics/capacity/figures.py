"""What the store has of a model: the figures that inference, Triton and Envoy tell (docs/operations.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from services.core.errors import NotFound
from services.metrics.accesslog import REQUESTS
from services.metrics.capacity.advice import Measured
from services.metrics.capacity.curve import Point
from services.metrics.queries import Aggregate, Query, Series
from services.metrics.scrape import TRITON
from services.metrics.store import Store

INFERENCE = "lingqu.inference."
SLOTS, RUNNING = f"{INFERENCE}slots", f"{INFERENCE}running"
ADMITTED, QUEUE_SECONDS = f"{INFERENCE}queue.admitted", f"{INFERENCE}queue.seconds"
QUEUE_LENGTH, IN_FLIGHT = f"{INFERENCE}queue.length", f"{INFERENCE}tokens.in_flight"

SECOND_NS = 1_000_000_000
STALE_S = 30.0
"""Inference tells every 5 s, Triton is asked every 10: who says nothing for so long is not there."""
LATELY_S = 300.0
BUCKET_S = 10
PEAK_BUCKETS = 6
AHEAD_S = 300  # what the collector takes of clocks that are ahead (intake.py)
WELL = ("OK", "200")


class ModelNotMeasured(NotFound):
    reason = "MODEL_NOT_MEASURED"


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads of one model, at one moment. Calls block, and raise what Store.query raises."""

    store: Store
    model: str
    now_ns: int
    version: str = ""

    def __call__(
        self,
        measurement: str,
        aggregate: Aggregate,
        since_s: float,
        field: str = "value",
        *,
        window_s: int = 0,
        by: tuple[str, ...] = (),
        percentile: float = 0.0,
        labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> list[Series]:
        """Also what senders tell whose clocks are ahead."""
        wanted: dict[str, Sequence[str]] = {"model": (self.model,), **labels}
        if self.version:
            wanted["version"] = (self.version,)
        start, end = self.now_ns - int(since_s * SECOND_NS), self.now_ns + AHEAD_S * SECOND_NS
        window_ns = window_s * SECOND_NS
        return self.store.query(
            Query(measurement, field, start, end, aggregate, percentile, window_ns, wanted, by)
        )

    def sum(self, measurement: str, since_s: float, field: str = "value", **labels: Sequence[str]) -> float:
        """0 if there is nothing."""
        found = self(measurement, Aggregate.SUM, since_s, field, labels=labels)
        return sum(value for series in found for _, value in series.values)

    def by(self, label: str, measurement: str, since_s: float) -> Mapping[str, float]:
        """Sums by a label's values."""
        found = self(measurement, Aggregate.SUM, since_s, by=(label,))
        return {dict(series.labels)[label]: sum(value for _, value in series.values) for series in found}

    def latest(self, measurement: str, since_s: float = LATELY_S) -> Mapping[str, tuple[float, float]]:
        """The newest value of every instance, and its age in seconds: less than 0 if the sender's clock is
        ahead. Of several series those that are not stale are added."""
        label, field = ("triton", "requests") if measurement == TRITON else ("instance", "value")
        by = (label, "priority", "version")
        found: dict[str, tuple[float, float]] = {}
        for series in self(measurement, Aggregate.LAST, since_s, field, window_s=1, by=by):
            at, value = series.values[-1]
            age = (self.now_ns - at) / SECOND_NS
            total, newest = found.get(name := dict(series.labels)[label], (0.0, age))
            found[name] = (total + (value if age <= STALE_S else 0.0), min(age, newest))
        return found

    def now(self, measurement: str) -> tuple[float, int]:
        """What all instances have now, and how many say so."""
        fresh = [value for value, age in self.latest(measurement).values() if age <= STALE_S]
        return float(sum(fresh)), len(fresh)


def measured(store: Store, model: str, version: int, window_s: float, now_ns: int) -> Measured:
    """Of a version; 0: the one that was asked most. Raises ModelNotMeasured, and what Store.query raises."""
    read = Reader(store, model, now_ns, str(version or ""))
    asked = read.by("version", ADMITTED, window_s)
    if asked:
        chosen = max(asked, key=lambda name: asked[name])
        return _of_slots(Reader(store, model, now_ns, chosen), window_s)
    there = _versions(read(SLOTS, Aggregate.LAST, window_s, by=("version",)))
    if there:
        return _of_slots(Reader(store, model, now_ns, there[-1]), window_s)
    executed = _versions(read(TRITON, Aggregate.SUM, window_s, "requests", by=("version",)))
    if executed:
        return _of_triton(Reader(store, model, now_ns, executed[-1]), window_s)
    raise ModelNotMeasured(_unknown(store, model, version, window_s))


def _of_slots(read: Reader, window_s: float) -> Measured:
    """A model with slots of its own: the batch curve is measured by inference (occupancy.py there)."""
    requests = read.sum(ADMITTED, window_s)
    seconds = read.by("level", f"{INFERENCE}level.seconds", window_s)
    slots = read.by("level", f"{INFERENCE}level.slots", window_s)
    work = read.by("level", f"{INFERENCE}level.work", window_s)
    points = tuple(
        Point(slots.get(level, 0.0) / held, held, work.get(level, 0.0))
        for level, held in seconds.items()
        if held > 0
    )
    done = sum(work.values())
    tokens = done / requests if requests > 0 else 0.0
    squares = read.sum(f"{INFERENCE}work.squared", window_s) / requests if requests > 0 else 0.0
    latest = read.latest(SLOTS)
    room = [value for value, _ in read.latest(f"{INFERENCE}kv.tokens").values()]
    there, age, notes = _there(latest)
    arrivals, peak = _arrivals(read, ADMITTED, "value", window_s)
    refused = read.sum(f"{INFERENCE}requests", LATELY_S, outcome=("refused",)) / LATELY_S
    makes = read.sum(f"{INFERENCE}tokens.generated", window_s) > 0
    return Measured(
        read.model,
        int(read.version or 0),
        requests,
        tokens,
        max(0.0, squares / tokens**2 - 1) if tokens > 0 else 0.0,
        points,
        int(min((value for value, _ in latest.values()), default=0)),
        arrivals + refused,
        peak,
        there,
        age,
        prompt_tokens=read.sum(f"{INFERENCE}tokens.prompt", window_s) / requests if makes else 0.0,
        kv_tokens=int(min(room, default=0)) if makes else 0,
        took=_took(read),
        notes=notes,
    )


def _of_triton(read: Reader, window_s: float) -> Measured:
    """A model that Triton alone knows: one that computes one batch after the other, whose times are taken to
    vary like exponential ones. Every request of a batch counts the batch's time."""
    requests = read.sum(TRITON, window_s, "requests")
    executions = read.sum(TRITON, window_s, "executions")
    busy = read.sum(TRITON, window_s, "compute_seconds") * (executions / requests if requests > 0 else 0.0)
    there, age, notes = _there(read.latest(TRITON))
    arrivals, peak = _arrivals(read, TRITON, "requests", window_s)
    return Measured(
        read.model,
        int(read.version or 0),
        requests,
        1.0,
        1.0,
        (Point(1.0, busy, requests),) if busy > 0 else (),
        1,
        arrivals,
        peak,
        there,
        age,
        took=_took(read),
        notes=(
            *notes,
            "by Triton's counters: one execution at a time, of times that vary as exponential ones",
        ),
    )


def _there(latest: Mapping[str, tuple[float, float]]) -> tuple[int, float, tuple[str, ...]]:
    """How many tell of themselves, how old the newest is, and what is odd about it."""
    age = min((age for _, age in latest.values()), default=LATELY_S)
    notes = []
    if age < -5:
        notes.append(f"the clock of a replica is ahead by {-age:.0f} s: rates of the last minutes are off")
    return sum(1 for _, old in latest.values() if old <= STALE_S), max(0.0, age), tuple(notes)


def _arrivals(read: Reader, measurement: str, field: str, window_s: float) -> tuple[float, float]:
    """Requests a second lately, and in the busiest minute. Where it was not measured for so long, since it
    was."""
    found = read(measurement, Aggregate.SUM, window_s, field, window_s=BUCKET_S)
    buckets = {at // SECOND_NS: value for series in found for at, value in series.values}
    if not buckets:
        return 0.0, 0.0
    now = read.now_ns // SECOND_NS
    since = max(now - LATELY_S, min(buckets))
    lately = sum(value for at, value in buckets.items() if at + BUCKET_S > since)
    minute = [sum(buckets.get(at + n * BUCKET_S, 0.0) for n in range(PEAK_BUCKETS)) for at in sorted(buckets)]
    return lately / max(now - since, BUCKET_S), max(minute) / (PEAK_BUCKETS * BUCKET_S)


def _took(read: Reader) -> Mapping[float, float]:
    found = {}
    for percentile in (50.0, 95.0, 99.0):
        series = read(
            REQUESTS,
            Aggregate.PERCENTILE,
            LATELY_S,
            "duration",
            percentile=percentile,
            labels={"status": WELL},
        )
        if series:
            found[percentile] = series[0].values[-1][1]
    return found


def _versions(found: list[Series]) -> list[str]:
    names = {dict(series.labels)["version"] for series in found}
    return sorted(names, key=lambda name: int(name) if name.isdecimal() else 0)


def _unknown(store: Store, model: str, version: int, window_s: float) -> str:
    known = sorted(
        {dict(labels).get("model", "") for name in (SLOTS, TRITON) for _, labels in store.series(name, 1000)}
        - {""}
    )
    what = f'"{model}"' + (f" version {version}" if version else "")
    among = f"; measured are {', '.join(known[:20])}" if known else ""
    return (
        f"nothing was measured of {what} in the last {window_s:.0f} s{among}. `lingqu models list` shows "
        "what there is; a model is measured when a replica has it"
    )
