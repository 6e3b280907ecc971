"""InfluxDB's line protocol, which has no way to write some texts: they are spelt so that they come back.

https://docs.influxdata.com/influxdb/v1/write_protocols/line_protocol_reference/ escapes what ends a name or
a value, but neither line feeds nor a backslash before such a sign, ignores lines that begin with #, and keeps
names like "time" for itself. Here `␛` (U+241B) begins what stands for one of these; all other texts are kept
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from services.metrics.points import Labels, Point, fault_of_series, fault_of_values

MAX_KNOWN = 50_000
ESCAPE = "␛"
NOTHING = f"{ESCAPE}."  # before names that are not free
RESERVED = frozenset({"time", "_field", "_measurement", "_time", "_value", "_name", "_tagKey", "_fieldKey"})

_SPELT = {chr(code): f"{ESCAPE}{code:02x}" for code in (*range(0x20), 0x7F)} | {ESCAPE: ESCAPE * 2}
_SPELLING = str.maketrans(_SPELT)
_BACKSLASH = re.compile(r"\\(?=[,= \\]|$)")
_SPELT_BACKSLASH = f"{ESCAPE}5c"
_SPELT_AGAIN = {spelt: char for char, spelt in _SPELT.items()} | {NOTHING: "", _SPELT_BACKSLASH: "\\"}
_TO_READ = re.compile(f"{ESCAPE}(?:{ESCAPE}|\\.|[0-9a-f]{{2}})")
_IN_MEASUREMENT = str.maketrans({",": "\\,", " ": "\\ "})
_IN_KEY = str.maketrans({",": "\\,", " ": "\\ ", "=": "\\="})


def spelt(text: str) -> str:
    """The text as InfluxDB is to know it: a measurement, the name of a field or a label, a label's value."""
    text = text.translate(_SPELLING)
    return _BACKSLASH.sub(_SPELT_BACKSLASH, text) if "\\" in text else text


def spelt_name(text: str) -> str:
    """The same for names, of which not all are free."""
    if text in RESERVED or text.startswith("#"):
        return NOTHING + spelt(text)
    return spelt(text)


def read(text: str) -> str:
    """What `spelt` and `spelt_name` made of a text, back."""
    if ESCAPE not in text:
        return text
    return _TO_READ.sub(lambda found: _SPELT_AGAIN.get(found[0], found[0]), text)


class Encoder:
    """Points as lines. What is the same for all points of a series is made once; for one thread at a time."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, Labels], str] = {}
        self._fields: dict[str, str] = {}

    def line(self, point: Point) -> str:
        """Raises ValueError with the reason if no store can keep the point."""
        key = self._series.get((point.measurement, point.labels))
        if key is None:
            key = self._known(point.measurement, point.labels)
        if fault := fault_of_values(point):
            raise ValueError(fault)
        names, fields = self._fields, []
        for name, value in point.fields.items():
            escaped = names.get(name)
            if escaped is None:
                if len(names) >= MAX_KNOWN:
                    names.clear()
                escaped = names[name] = spelt_name(name).translate(_IN_KEY)
            fields.append(f"{escaped}={float(value)!r}")
        return f"{key} {','.join(fields)} {point.time_ns}"

    def _known(self, measurement: str, labels: Labels) -> str:
        if fault := fault_of_series(measurement, labels):
            raise ValueError(fault)
        if len(self._series) >= MAX_KNOWN:
            self._series.clear()
        key = self._series[measurement, labels] = series_key(measurement, labels)
        return key


def series_key(measurement: str, labels: Labels) -> str:
    """A label without a value is none."""
    pairs = [
        f"{spelt_name(name).translate(_IN_KEY)}={spelt(value).translate(_IN_KEY)}"
        for name, value in labels
        if value
    ]
    return ",".join([spelt_name(measurement).translate(_IN_MEASUREMENT), *pairs])


def read_series_key(key: str) -> tuple[str, Labels]:
    """What `series_key` made, back; its labels in order."""
    parts = _split(key, ",")
    pairs = [_split(part, "=", 1) for part in parts[1:]]
    known = {read(_unescaped(name)): read(_unescaped(value)) for name, value in pairs}
    return read(_ESCAPED_MEASUREMENT.sub(r"\1", parts[0])), tuple(sorted(known.items()))


_ESCAPED = re.compile(r"\\([,= ])")
_ESCAPED_MEASUREMENT = re.compile(r"\\([, ])")


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


_SEPARATORS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {sign: re.compile(rf"(?<!\\){sign}") for sign in ",="}
)


def _split(text: str, sign: str, most: int = 0) -> list[str]:
    """At signs without a backslash before them."""
    return _SEPARATORS[sign].split(text, most)
