"""What a rule asks the store, and what the answers say; nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from services.metrics.alerts.rules import Absence, BurnRate, Change, Condition, Selection, Threshold
from services.metrics.points import Labels
from services.metrics.queries import Aggregate, Query, Series


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rule sees of one series. Its value is the aggregate; of a change how fast, a second; of an
    absence for how many seconds nothing came, at least; of a budget the burn rate, as a multiple of what it
    may be."""

    value: float
    breach: bool


Answers = Sequence[Sequence[Series]]


def questions(condition: Condition, now_ns: int) -> tuple[Query, ...]:
    """To be answered in this order."""
    found = condition.selection
    match condition:
        case Threshold():
            return (_query(found, condition.window_s, 0, now_ns),)
        case Change():
            return (
                _query(found, condition.window_s, 0, now_ns),
                _query(found, condition.window_s, condition.over_s, now_ns),
            )
        case Absence():
            counted = replace(found, aggregate=Aggregate.COUNT, percentile=0.0)
            asked = (_query(counted, condition.window_s, 0, now_ns),)
            return (*asked, _query(counted, condition.remembered_s, 0, now_ns)) if found.group_by else asked
        case BurnRate():
            every = replace(found, aggregate=Aggregate.SUM, percentile=0.0)
            bad = replace(every, filters={**every.filters, **condition.bad})
            return tuple(
                _query(selection, length_s, 0, now_ns)
                for length_s in _lengths(condition)
                for selection in (every, bad)
            )


def readings(condition: Condition, answers: Answers) -> dict[Labels, Reading]:
    """By the labels of the groups."""
    match condition:
        case Threshold():
            return {
                labels: Reading(value, condition.comparison.holds(value, condition.value))
                for labels, value in _values(answers[0]).items()
            }
        case Change():
            before = _values(answers[1])
            changes = {
                labels: (value - before[labels]) / condition.over_s
                for labels, value in _values(answers[0]).items()
                if labels in before
            }
            return {
                labels: Reading(value, condition.comparison.holds(value, condition.value))
                for labels, value in changes.items()
            }
        case Absence():
            here = _values(answers[0])
            known = set(_values(answers[1])) if condition.selection.group_by else {()}
            return {
                labels: Reading(0.0 if labels in here else condition.window_s, labels not in here)
                for labels in known | set(here)
            }
        case BurnRate():
            return _burn(condition, answers)


def _burn(rule: BurnRate, answers: Answers) -> dict[Labels, Reading]:
    budget = 1 - rule.objective
    every: dict[float, Mapping[Labels, float]] = {}
    rates: dict[float, dict[Labels, float]] = {}
    for number, length_s in enumerate(_lengths(rule)):
        every[length_s] = _values(answers[2 * number])
        bad = _values(answers[2 * number + 1])
        rates[length_s] = {
            labels: max(0.0, bad.get(labels, 0.0)) / total / budget
            for labels, total in every[length_s].items()
            if total > 0
        }
    found: dict[Labels, Reading] = {}
    for labels in {labels for known in rates.values() for labels in known}:
        breaching, highest = [], 0.0
        for window in rule.windows:
            long = rates[window.long_s].get(labels, 0.0)
            short = rates[window.short_s].get(labels, 0.0)
            enough = every[window.long_s].get(labels, 0.0) >= rule.least
            highest = max(highest, long)
            if enough and long >= window.factor and short >= window.factor:
                breaching.append(long)
        found[labels] = Reading(max(breaching, default=highest), bool(breaching))
    return found


def _lengths(rule: BurnRate) -> list[float]:
    return sorted({length for window in rule.windows for length in (window.long_s, window.short_s)})


def _query(found: Selection, length_s: float, ago_s: float, now_ns: int) -> Query:
    end = max(1, now_ns - int(ago_s * 1e9))
    return Query(
        found.measurement,
        found.field,
        max(0, end - int(length_s * 1e9)),
        end,
        found.aggregate,
        found.percentile,
        0,
        found.filters,
        found.group_by,
    )


def _values(series: Sequence[Series]) -> Mapping[Labels, float]:
    return {found.labels: found.values[-1][1] for found in series if found.values}
