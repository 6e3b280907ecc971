"""Figures on their way to a collector by OTLP over HTTP, out of the way of who measures them.

HTTP, not gRPC: a training forks workers for its data, and gRPC does not take a fork while it has threads.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2

from services.core.backoff import Backoff

log = logging.getLogger(__name__)

MAX_QUEUED = 1_000
AT_ONCE = 50  # records of an export
TIMEOUT_S = 2.0
CLOSE_S = 3.0
_AGAIN = frozenset({408, 429, 502, 503, 504})  # of HTTP, by OTLP's specification
_DIRECT = urllib.request.ProxyHandler({})


@dataclass(frozen=True, slots=True)
class Record:
    """Gauges of one moment, by their names; all with the same labels."""

    gauges: Mapping[str, float]
    labels: Mapping[str, str]
    time_ns: int


@dataclass(frozen=True, slots=True)
class Trust:
    """PEM files for a collector that speaks TLS: the CA that its certificate is from, and the certificate and
    key to show to it. They are read at each export: one that was renewed is used."""

    ca: Path | str
    certificate: tuple[Path | str, Path | str] | None = None

    def context(self) -> ssl.SSLContext:
        """Raises OSError."""
        made = ssl.create_default_context(cafile=self.ca)
        if self.certificate is not None:
            made.load_cert_chain(*self.certificate)
        return made


class Exports:
    """Between `with` and its end. `offer` never waits and never raises: while the collector is away, at most
    `most` records are kept, and of more the oldest are dropped and counted. When it takes some again it is
    told the number by the counter `counter`, with `labels`."""

    def __init__(
        self,
        url: str,
        counter: str,
        labels: Mapping[str, str],
        most: int = MAX_QUEUED,
        trust: Trust | None = None,
    ) -> None:
        """`url` is that of the collector, without a path; `trust`: whom to, where that is https."""
        self._url = f"{url.rstrip('/')}/v1/metrics"
        self._counter, self._labels, self._most, self._trust = counter, labels, most, trust
        self._queue: deque[Record] = deque()
        self._changed = threading.Condition()
        self._stop_at: float | None = None
        self._began_ns = time.time_ns()
        self._dropped = self._told = 0
        self._away = False
        self._thread = threading.Thread(target=self._run, name="training-figures", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sends what is left for CLOSE_S at most, and the answer that is waited for then."""
        with self._changed:
            self._stop_at = time.monotonic() + CLOSE_S
            self._changed.notify_all()
        self._thread.join(CLOSE_S + TIMEOUT_S)

    @property
    def dropped(self) -> int:
        """Records that the collector will not get, or refused."""
        return self._dropped

    @property
    def queued(self) -> int:
        return len(self._queue)

    def offer(self, record: Record) -> None:
        with self._changed:
            if len(self._queue) >= self._most:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append(record)
            self._changed.notify_all()

    def _run(self) -> None:
        backoff = Backoff(0.1, 5.0)
        while taken := self._take():
            dropped = self._dropped
            answer = self._sent(self._message(taken, dropped - self._told))
            if answer is not None:
                self._told = dropped if answer else self._told
                self._dropped += 0 if answer else len(taken)
                backoff.reset()
                continue
            with self._changed:
                room = self._most - len(self._queue)
                self._queue.extendleft(reversed(taken[-room:] if room else ()))
                self._dropped += max(0, len(taken) - room)
            if not self._pause(backoff.delay()):
                break
        with self._changed:
            self._dropped += len(self._queue)
            self._queue.clear()
        if self._dropped > self._told:
            log.warning("%d records of training figures were not told", self._dropped - self._told)

    def _take(self) -> list[Record]:
        """None at the end."""
        with self._changed:
            while not self._queue:
                if self._stop_at is not None:
                    return []
                self._changed.wait()
            return [self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))]

    def _sent(self, body: bytes) -> bool | None:
        """Whether it was taken, or refused for good; None if it has to be sent again."""
        request = urllib.request.Request(  # noqa: S310 - the URL is the caller's setting
            self._url, body, {"content-type": "application/x-protobuf"}
        )
        left = TIMEOUT_S if self._stop_at is None else max(0.1, self._stop_at - time.monotonic())
        try:
            with self._opener().open(request, timeout=min(TIMEOUT_S, left)) as answer:
                answer.read()
        except urllib.error.HTTPError as err:
            with err:
                if err.code not in _AGAIN:
                    log.warning("%s refuses training figures: HTTP %d", self._url, err.code)
                    return False
            self._is_away(f"HTTP {err.code}")
            return None
        except (OSError, HTTPException) as err:
            self._is_away(str(getattr(err, "reason", err)))
            return None
        if self._away:
            log.info("%s is back", self._url)
            self._away = False
        return True

    def _opener(self) -> urllib.request.OpenerDirector:
        """Raises OSError."""
        context = self._trust.context() if self._trust is not None else None
        return urllib.request.build_opener(_DIRECT, urllib.request.HTTPSHandler(context=context))

    def _is_away(self, why: str) -> None:
        if not self._away:
            log.warning("%s does not take training figures: %s; %d are kept", self._url, why, self._most)
            self._away = True

    def _pause(self, seconds: float) -> bool:
        """False when the time is over."""
        with self._changed:
            if self._stop_at is not None:
                seconds = min(seconds, self._stop_at - time.monotonic())
            return seconds > 0 and (
                self._changed.wait_for(lambda: self._stop_at is not None, seconds) or True
            )

    def _message(self, records: list[Record], dropped: int) -> bytes:
        request = metrics_service_pb2.ExportMetricsServiceRequest()
        metrics = request.resource_metrics.add().scope_metrics.add().metrics
        known: dict[str, metrics_pb2.Metric] = {}
        for record in records:
            for name, value in record.gauges.items():
                if name not in known:
                    known[name] = metrics.add(name=name)
                point = known[name].gauge.data_points.add(as_double=value, time_unix_nano=record.time_ns)
                _label(point, record.labels)
        if dropped:
            counter = metrics.add(name=self._counter).sum
            counter.is_monotonic = True
            counter.aggregation_temporality = metrics_pb2.AGGREGATION_TEMPORALITY_DELTA
            # The same when it is sent again, so that it is known for that.
            point = counter.data_points.add(as_int=dropped, time_unix_nano=records[-1].time_ns)
            point.start_time_unix_nano = self._began_ns
            _label(point, self._labels)
        return bytes(request.SerializeToString())


def _label(point: metrics_pb2.NumberDataPoint, labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        point.attributes.add(key=key).value.string_value = value
