"""How many series there may be. Whatever is sent, memory and the store's index stay bounded.

A measurement of ours has the labels of LABELS and no others. Any other has at most MAX_LABELS, none of which
may be an identifier of a single request, by its name or by its looks. A label set that would be one too many
becomes the measurement's one overflow series.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from services.metrics.points import Labels

MAX_LABELS = 8
MAX_VALUE_LENGTH = 128
MAX_NAME_LENGTH = 128
MAX_SERIES = 5_000
MAX_SERIES_OVERALL = 20_000
MAX_MEASUREMENTS = 500
MAX_FIELDS = 128
OVERFLOW: Labels = (("overflow", "true"),)

_OF_INFERENCE = frozenset({"service", "instance", "model", "version", "priority", "outcome", "level"})
LABELS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "requests": frozenset({"client", "model", "version", "status", "api"}),
        "answers.compared": frozenset({"model", "version", "before", "by"}),
        "host": frozenset({"host"}),
        "gpu": frozenset({"host", "gpu", "name"}),
        "triton": frozenset({"triton", "model", "version"}),
        "collector": frozenset({"what", "why"}),
        "spool": frozenset(),
        "training": frozenset({"run"}),
        "training.layers": frozenset({"run", "layer"}),
    }
)
INFERENCE = "lingqu.inference."

# Names of what is another one for each request, user or process.
_IDENTIFIERS = re.compile(
    r"(^|[._-])(request|trace|span|session|message|correlation|transaction|instance|thread|process)[._-]?id$"
    r"|^(id|uuid|guid|pid|traceparent|timestamp)$",
    re.IGNORECASE,
)
# UUIDs, hexadecimal digests, trace ids, long numbers.
_IDENTIFIER_VALUE = re.compile(
    r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}|[0-9a-f]{16,}|\d{10,}", re.IGNORECASE
)
_NAME = re.compile(r"[A-Za-z_][\w.:/-]*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class Admitted(NamedTuple):
    """What a label set becomes. `reduced`: others may become the same."""

    labels: Labels
    overflow: bool = False
    reduced: bool = False


class Cardinality:
    """Which label sets have been admitted. `rotate` forgets those that did not come between the last two
    calls, and makes room for new ones."""

    def __init__(
        self,
        series: int = MAX_SERIES,
        overall: int = MAX_SERIES_OVERALL,
        measurements: int = MAX_MEASUREMENTS,
        fields: int = MAX_FIELDS,
    ) -> None:
        self._series, self._overall = series, overall
        self._measurements, self._max_fields = measurements, fields
        self._now: dict[str, set[Labels]] = {}
        self._before: dict[str, set[Labels]] = {}
        self._fields: dict[str, set[str]] = {}
        self._total = 0
        self._exact: dict[tuple[str, tuple[tuple[str, str], ...]], Admitted] = {}
        # By identity, for sources that keep their label sets: finding one by its texts takes longer than all
        # that is left to do for a point. What is held here cannot have been replaced at its address.
        self._same: dict[int, tuple[Mapping[str, str], str, Admitted]] = {}

    def __len__(self) -> int:
        return self._total

    def admit(self, measurement: str, labels: Mapping[str, str]) -> Admitted | None:
        """None if there are too many measurements. The overflow series counts as none. `labels` are not
        changed by anybody afterwards."""
        same = self._same.get(id(labels))
        if same is not None and same[0] is labels and same[1] == measurement:
            return same[2]
        asked = measurement, tuple(labels.items())
        if (found := self._exact.get(asked)) is not None:
            return self._known(measurement, labels, found)
        kept = allowed(measurement, labels)
        reduced = len(kept) < len(labels) or any(labels[name] != value for name, value in kept)
        known = self._knows(measurement, kept)
        if known is None:
            return None
        if not known:
            return Admitted(OVERFLOW, overflow=True, reduced=True)
        admitted = Admitted(kept, reduced=reduced)
        if not reduced and len(self._exact) < 2 * self._overall:  # then what is kept has a bounded length
            self._exact[asked] = admitted
            return self._known(measurement, labels, admitted)
        return admitted

    def _known(self, measurement: str, labels: Mapping[str, str], admitted: Admitted) -> Admitted:
        if len(self._same) >= 2 * self._overall:
            self._same.clear()
        self._same[id(labels)] = labels, measurement, admitted
        return admitted

    def _knows(self, measurement: str, kept: Labels) -> bool | None:
        """Whether there is room for the series; None if there is none for the measurement."""
        now, before = self._now.get(measurement), self._before.get(measurement)
        if now is None:
            if before is None and len(self._now.keys() | self._before.keys()) >= self._measurements:
                return None
            now = self._now[measurement] = set()
        if kept in now:
            return True
        if before is not None and kept in before:
            before.discard(kept)
            now.add(kept)
            return True
        if len(now) + len(before or ()) >= self._series or self._total >= self._overall:
            return False
        now.add(kept)
        self._total += 1
        return True

    def admits_fields(self, measurement: str, names: Mapping[str, float]) -> bool:
        """Whether the measurement may have all of these fields."""
        known = self._fields.get(measurement)
        if known is None:
            if len(self._fields) >= self._measurements:
                return False
            known = self._fields[measurement] = set()
        if known.issuperset(names):
            return True
        if len(known | names.keys()) > self._max_fields:
            return False
        known.update(names)
        return True

    def rotate(self) -> None:
        self._before, self._now = self._now, {}
        self._exact.clear()
        self._same.clear()
        self._total = sum(map(len, self._before.values()))
        self._fields = {name: known for name, known in self._fields.items() if name in self._before}


def allowed(measurement: str, labels: Mapping[str, str]) -> Labels:
    """Those of the labels that the measurement may have, with their values cut."""
    ours = _OF_INFERENCE if measurement.startswith(INFERENCE) else LABELS.get(measurement)
    kept: list[tuple[str, str]] = []
    for name in sorted(labels):
        value = labels[name]
        if ours is not None:
            if name not in ours:
                continue
        elif len(kept) == MAX_LABELS:
            break
        elif not good_name(name) or _IDENTIFIERS.search(name) or _IDENTIFIER_VALUE.fullmatch(value):
            continue
        if len(value) > MAX_VALUE_LENGTH:
            value = value[: MAX_VALUE_LENGTH - 1] + "…"
        if not value.isprintable():
            value = _CONTROL.sub(" ", value).strip()
        if value:
            kept.append((name, value))
    return tuple(kept)


@lru_cache(4096)
def good_name(name: str) -> bool:
    """Of a measurement or a label."""
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None
