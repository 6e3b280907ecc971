"""Alert rules as values: what is asked of the store, and when the answer is a reason to tell somebody."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.metrics.queries import Aggregate

MAX_EVERY_S = 300.0
PARTS_OF_A_WINDOW = 10
PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class Comparison(StrEnum):
    ABOVE = "above"
    AT_LEAST = "at_least"
    BELOW = "below"
    AT_MOST = "at_most"

    def holds(self, value: float, threshold: float) -> bool:
        match self:
            case Comparison.ABOVE:
                return value > threshold
            case Comparison.AT_LEAST:
                return value >= threshold
            case Comparison.BELOW:
                return value < threshold
            case Comparison.AT_MOST:
                return value <= threshold


@dataclass(frozen=True, slots=True)
class Selection:
    """What of the store is looked at: a Query (queries.py) without its range."""

    measurement: str
    field: str = "value"
    aggregate: Aggregate = Aggregate.SUM
    percentile: float = 0.0
    filters: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    group_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Threshold:
    """The aggregate of the last `window_s` compares to `value`. A series without values breaches nothing."""

    selection: Selection
    window_s: float
    comparison: Comparison
    value: float


@dataclass(frozen=True, slots=True)
class Change:
    """The aggregate of the last `window_s`, less that of the window which ended `over_s` earlier, divided by
    `over_s`: how fast it changes, a second. A series without values in either breaches nothing."""

    selection: Selection
    window_s: float
    over_s: float
    comparison: Comparison
    value: float


@dataclass(frozen=True, slots=True)
class Absence:
    """Nothing came in the last `window_s`. With groups: nothing of a series that came within `remembered_s`;
    longer ago it is forgotten, and no alert any more."""

    selection: Selection
    window_s: float
    remembered_s: float


@dataclass(frozen=True, slots=True)
class BurnWindow:
    """The budget burns `factor` times as fast as it may in the last `long_s` and in the last `short_s`: the
    long one says that it matters, the short one that it has not ended."""

    long_s: float
    short_s: float
    factor: float


@dataclass(frozen=True, slots=True)
class BurnRate:
    """An error budget burns too fast: multi-window, multi-burn-rate alerts as in Google's Site Reliability
    Workbook, chapter 5, "Alerting on SLOs", section 6 (https://sre.google/workbook/alerting-on-slos/).

    `selection` are all events, `bad` what more has to fit of those that count as failed. The burn rate is
    their share divided by the budget, 1 - `objective`. Any of `windows` is enough. In a long window with
    fewer than `least` events nothing breaches: one failure of three is no trend."""

    selection: Selection
    bad: Mapping[str, Sequence[str]]
    objective: float
    windows: tuple[BurnWindow, ...]
    least: float = 0.0


Condition = Threshold | Change | Absence | BurnRate


@dataclass(frozen=True, slots=True)
class Rule:
    """When `condition` held for `for_s`, an alert a series fires, and until it has not held for
    `keep_firing_s`. In `summary` {value} and names of labels in braces stand for what they are."""

    name: str
    condition: Condition
    severity: Severity = Severity.WARNING
    for_s: float = 0.0
    keep_firing_s: float = 0.0
    summary: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    disabled: bool = False

    def every_s(self, least_s: float) -> float:
        """How often it is evaluated: ten times within its shortest window, at least every five minutes, and
        not more often than every `least_s`."""
        return max(least_s, min(MAX_EVERY_S, shortest_s(self.condition) / PARTS_OF_A_WINDOW))


def shortest_s(condition: Condition) -> float:
    if isinstance(condition, BurnRate):
        return min(window.short_s for window in condition.windows)
    return condition.window_s


def placeholders(condition: Condition, labels: Mapping[str, str]) -> frozenset[str]:
    """What a summary may have in braces."""
    return frozenset({"value", *condition.selection.group_by, *labels})


def summarised(rule: Rule, labels: Mapping[str, str], value: float) -> str:
    known = {**rule.labels, **labels, "value": f"{value:.4g}"}
    text = PLACEHOLDER.sub(lambda found: known.get(found[1], found[0]), rule.summary)
    return text or f"{rule.name}: {value:.4g}"
