"""Questions as InfluxQL, and its answers as series.

InfluxQL is what every InfluxDB from 1.x to 3.x understands. Texts of a question only get into it quoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from services.metrics.points import Labels
from services.metrics.queries import Aggregate, Query, Series
from services.metrics.stores.lineprotocol import read, spelt, spelt_name

Windows = dict[Labels, dict[int, list[float]]]
"""Numbers by group and beginning of the window."""

SLICES = 4
MIN_SLICED_NS = 3600 * 1_000_000_000

# What is asked of raw points, and of roll-ups; answers about parts of a window are joined by `joined`.
_RAW = {
    Aggregate.MEAN: ("sum({})", "count({})"),
    Aggregate.SUM: ("sum({})",),
    Aggregate.MIN: ("min({})",),
    Aggregate.MAX: ("max({})",),
    Aggregate.COUNT: ("count({})",),
    Aggregate.LAST: ("last({})",),
    Aggregate.RATE: ("sum({})",),
}
ROLLED = ("count", "sum", "min", "max", "last")
"""Functions of a roll-up; it has a field for each field and function, as `SELECT count(*)` names it."""
_ROLLED_UP = {
    Aggregate.MEAN: (("sum", "sum"), ("sum", "count")),
    Aggregate.SUM: (("sum", "sum"),),
    Aggregate.MIN: (("min", "min"),),
    Aggregate.MAX: (("max", "max"),),
    Aggregate.COUNT: (("sum", "count"),),
    Aggregate.LAST: (("last", "last"),),
    Aggregate.RATE: (("sum", "sum"),),
}


class Table(NamedTuple):
    """Where points are: "" for what the server need not be told."""

    database: str
    policy: str
    rolled_up: bool = False

    def of(self, measurement: str) -> str:
        name = quoted(spelt_name(measurement))
        return f"{quoted(self.database)}.{quoted(self.policy)}.{name}" if self.policy else name


def quoted(name: str) -> str:
    """An identifier."""
    return '"' + _escaped(name).replace('"', '\\"') + '"'


def literal(text: str) -> str:
    """A string."""
    return "'" + _escaped(text).replace("'", "\\'") + "'"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def roll_up(source: str, into: str, start_ns: int, end_ns: int) -> str:
    """Everything of that time in `source`, a point for each minute and series in `into`."""
    columns = ", ".join(f"{function}(*)" for function in ROLLED)
    return (
        f"SELECT {columns} INTO {into}.:MEASUREMENT FROM {source}./.*/ "  # noqa: S608
        f"WHERE time >= {start_ns} AND time < {end_ns} GROUP BY time(1m), * fill(none)"
    )


def one_of_each(table: str) -> str:
    """A point of each series."""
    return f"SELECT * FROM {table} GROUP BY * LIMIT 1"  # noqa: S608


class Part(NamedTuple):
    """A range of time of a table."""

    table: Table
    start_ns: int
    end_ns: int


def sliced(query: Query, part: Part) -> list[Part]:
    """Parts of a part, to be asked side by side: a server computes each with one processor. Whole windows, so
    that answers need not be put together; one if it is short."""
    window = query.window_ns
    if not window or part.end_ns - part.start_ns < max(MIN_SLICED_NS, 2 * SLICES * window):
        return [part]
    step = -(-(part.end_ns - part.start_ns) // (SLICES * window)) * window
    first = part.start_ns - part.start_ns % window
    starts = [part.start_ns, *range(first + step, part.end_ns, step)]
    return [
        Part(part.table, start, end) for start, end in zip(starts, [*starts[1:], part.end_ns], strict=True)
    ]


def select(query: Query, part: Part, *, alone: bool) -> str:
    """`alone`: no window is in another part, too."""
    table, start_ns, end_ns = part
    wanted = [f"time >= {start_ns}", f"time < {end_ns}"]
    for label, values in query.filters.items():
        name = quoted(spelt_name(label)) + "::tag"
        wanted.append("(" + " OR ".join(f"{name} = {literal(spelt(value))}" for value in values) + ")")
    groups = [quoted(spelt_name(label)) for label in query.group_by]
    if query.window_ns:
        groups.insert(0, f"time({query.window_ns}ns)")
    text = f"SELECT {_selected(query, table, alone)} FROM {table.of(query.measurement)}"  # noqa: S608
    text += f" WHERE {' AND '.join(wanted)}"
    if groups:
        text += f" GROUP BY {', '.join(groups)}"
    return text + " fill(none)" if query.window_ns else text


def _selected(query: Query, table: Table, alone: bool) -> str:
    name = spelt_name(query.field)
    if table.rolled_up:
        parts = _ROLLED_UP[query.aggregate]
        return ", ".join(f"{function}({quoted(f'{kind}_{name}')}::field)" for function, kind in parts)
    field = quoted(name) + "::field"
    if query.aggregate is Aggregate.MEAN and alone:
        return f"mean({field})"  # takes half the time of a sum and a count
    if query.aggregate is Aggregate.PERCENTILE:
        return f"percentile({field}, {query.percentile:.9f})"
    return ", ".join(function.format(field) for function in _RAW[query.aggregate])


def answered(query: Query, rows: Iterable[Mapping[str, Any]]) -> Windows:
    """What the answer to `select` says."""
    found: Windows = {}
    for row in rows:
        tags = row.get("tags") or {}
        group = tuple((label, read(tags.get(spelt_name(label)) or "")) for label in sorted(query.group_by))
        windows = found.setdefault(group, {})
        for time_ns, *numbers in row["values"]:
            if None not in numbers:
                windows[time_ns if query.window_ns else query.start_ns] = numbers
    return found


def joined(query: Query, parts: Iterable[Windows]) -> list[Series]:
    """One answer of those about parts of the range, the oldest first."""
    found: Windows = {}
    for part in parts:
        for group, windows in part.items():
            known = found.setdefault(group, windows)
            if known is windows:
                continue
            for begin, numbers in windows.items():
                old = known.get(begin)
                known[begin] = numbers if old is None else _both(query.aggregate, old, numbers)
    return [
        Series(group, tuple((begin, _value(query, numbers)) for begin, numbers in sorted(windows.items())))
        for group, windows in sorted(found.items())
        if windows
    ]


def _both(aggregate: Aggregate, old: list[float], new: list[float]) -> list[float]:
    if aggregate is Aggregate.MIN:
        return [min(old[0], new[0])]
    if aggregate is Aggregate.MAX:
        return [max(old[0], new[0])]
    if aggregate is Aggregate.LAST:
        return new
    return [one + other for one, other in zip(old, new, strict=True)]


def _value(query: Query, numbers: list[float]) -> float:
    if query.aggregate is Aggregate.MEAN and len(numbers) == 2:
        return numbers[0] / numbers[1]
    if query.aggregate is Aggregate.RATE:
        return numbers[0] / ((query.window_ns or query.end_ns - query.start_ns) / 1e9)
    return float(numbers[0])
