"""Between `lingqu.metrics.v1` and rules, alerts and silences; a mistake names its field, and what helps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from services.core.errors import InvalidInput
from services.metrics import convert
from services.metrics.alerts.rules import (
    PLACEHOLDER,
    Absence,
    BurnRate,
    BurnWindow,
    Change,
    Comparison,
    Condition,
    Rule,
    Selection,
    Severity,
    Threshold,
    placeholders,
)
from services.metrics.alerts.silences import MAX_LENGTH_S, Silence
from services.metrics.queries import Aggregate

MIN_WINDOW_S, MAX_WINDOW_S = 5.0, 30 * 86_400.0
MAX_HOLD_S = 7 * 86_400.0
MAX_SUMMARY, MAX_LABELS, MAX_LABEL_VALUE = 500, 10, 128
MAX_BURN_WINDOWS, MAX_MATCHERS, MAX_AUTHOR, MAX_REASON = 4, 10, 100, 500
RESERVED = ("alertname", "severity")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")
_SEVERITIES = {
    alerts_pb2.SEVERITY_INFO: Severity.INFO,
    alerts_pb2.SEVERITY_WARNING: Severity.WARNING,
    alerts_pb2.SEVERITY_CRITICAL: Severity.CRITICAL,
}
_COMPARISONS = {
    alerts_pb2.COMPARISON_ABOVE: Comparison.ABOVE,
    alerts_pb2.COMPARISON_AT_LEAST: Comparison.AT_LEAST,
    alerts_pb2.COMPARISON_BELOW: Comparison.BELOW,
    alerts_pb2.COMPARISON_AT_MOST: Comparison.AT_MOST,
}
SEVERITY_NUMBERS = {severity: number for number, severity in _SEVERITIES.items()}
_COMPARISON_NUMBERS = {comparison: number for number, comparison in _COMPARISONS.items()}


def to_rule(message: metrics_pb2.AlertRule) -> Rule:
    """Raises InvalidInput; fields begin with `rule.`."""
    if not _NAME.fullmatch(message.name):
        raise InvalidInput(
            "rule.name", 'has 1 to 64 letters, digits, "_", "." and "-", none of these three first'
        )
    condition = _condition(message)
    labels = _labels(message, condition)
    if message.severity and message.severity not in _SEVERITIES:
        raise InvalidInput("rule.severity", "is unknown: info, warning or critical")
    known = placeholders(condition, labels)
    if len(message.summary) > MAX_SUMMARY:
        raise InvalidInput("rule.summary", f"has at most {MAX_SUMMARY} characters")
    for name in PLACEHOLDER.findall(message.summary):
        if name not in known:
            raise InvalidInput(
                "rule.summary",
                f'names "{{{name}}}", which is no label of it; there are {", ".join(sorted(known))}',
            )
    return Rule(
        message.name,
        condition,
        _SEVERITIES.get(message.severity, Severity.WARNING),
        _seconds(message, "hold_for", "rule.hold_for", 0.0, MAX_HOLD_S, 0.0),
        _seconds(message, "keep_firing", "rule.keep_firing", 0.0, MAX_HOLD_S, 0.0),
        message.summary,
        labels,
        message.disabled,
    )


def from_rule(rule: Rule, default: bool = False) -> metrics_pb2.AlertRule:
    found = metrics_pb2.AlertRule(
        name=rule.name,
        severity=SEVERITY_NUMBERS[rule.severity],
        hold_for=duration(rule.for_s),
        keep_firing=duration(rule.keep_firing_s),
        summary=rule.summary,
        labels=dict(rule.labels),
        disabled=rule.disabled,
        default_rule=default,
    )
    condition = rule.condition
    selection = _from_selection(condition.selection)
    match condition:
        case Threshold():
            found.threshold.CopyFrom(
                metrics_pb2.ThresholdCondition(
                    selection=selection,
                    window=duration(condition.window_s),
                    comparison=_COMPARISON_NUMBERS[condition.comparison],
                    value=condition.value,
                )
            )
        case Change():
            found.change.CopyFrom(
                metrics_pb2.ChangeCondition(
                    selection=selection,
                    window=duration(condition.window_s),
                    over=duration(condition.over_s),
                    comparison=_COMPARISON_NUMBERS[condition.comparison],
                    value=condition.value,
                )
            )
        case Absence():
            found.absence.CopyFrom(
                metrics_pb2.AbsenceCondition(
                    selection=selection,
                    window=duration(condition.window_s),
                    remembered=duration(condition.remembered_s),
                )
            )
        case BurnRate():
            found.burn_rate.CopyFrom(
                metrics_pb2.BurnRateCondition(
                    selection=selection,
                    bad=_from_filters(condition.bad),
                    objective=condition.objective,
                    windows=[
                        metrics_pb2.BurnWindow(
                            long=duration(window.long_s),
                            short=duration(window.short_s),
                            factor=window.factor,
                        )
                        for window in condition.windows
                    ],
                    least=condition.least,
                )
            )
    return found


def to_silence(message: alerts_pb2.Silence, id_: str, author: str, now_ns: int) -> Silence:
    """A new one. Raises InvalidInput; fields begin with `silence.`."""
    if not 1 <= len(message.matchers) <= MAX_MATCHERS:
        raise InvalidInput("silence.matchers", f"has 1 to {MAX_MATCHERS}")
    for number, matcher in enumerate(message.matchers):
        if not _LABEL.fullmatch(matcher.label):
            raise InvalidInput(
                f"silence.matchers[{number}].label", "is the name of a label, such as alertname"
            )
        if len(matcher.value) > MAX_LABEL_VALUE:
            raise InvalidInput(
                f"silence.matchers[{number}].value", f"has at most {MAX_LABEL_VALUE} characters"
            )
    if not message.reason.strip() or len(message.reason) > MAX_REASON:
        raise InvalidInput("silence.reason", f"is required, with at most {MAX_REASON} characters")
    if len(message.author) > MAX_AUTHOR:
        raise InvalidInput("silence.author", f"has at most {MAX_AUTHOR} characters")
    until_ns = _ns(message.until)
    if not now_ns < until_ns <= now_ns + MAX_LENGTH_S * 1_000_000_000:
        raise InvalidInput("silence.until", "is required, from now on, at most 90 days ahead")
    matchers = tuple((matcher.label, matcher.value) for matcher in message.matchers)
    return Silence(id_, matchers, until_ns, message.author or author, message.reason, now_ns)


def restored_silence(message: alerts_pb2.Silence) -> Silence:
    """One that was checked when it was made."""
    return Silence(
        message.id,
        tuple((matcher.label, matcher.value) for matcher in message.matchers),
        _ns(message.until),
        message.author,
        message.reason,
        _ns(message.created_time),
    )


def from_silence(silence: Silence) -> alerts_pb2.Silence:
    return alerts_pb2.Silence(
        id=silence.id,
        matchers=[alerts_pb2.Matcher(label=label, value=value) for label, value in silence.matchers],
        until=timestamp(silence.until_ns),
        author=silence.author,
        reason=silence.reason,
        created_time=timestamp(silence.created_ns),
    )


def timestamp(ns: int) -> Timestamp:
    return Timestamp(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000)


def _condition(message: metrics_pb2.AlertRule) -> Condition:
    kind = message.WhichOneof("condition")
    if kind is None:
        raise InvalidInput("rule.condition", "is required: threshold, change, absence or burn_rate")
    path, found = f"rule.{kind}", getattr(message, kind)
    counted = kind in ("absence", "burn_rate")
    selection = _selection(found.selection, f"{path}.selection", counted)
    if kind == "burn_rate":
        return _burn_rate(found, selection, path)
    window_s = _seconds(found, "window", f"{path}.window", MIN_WINDOW_S, MAX_WINDOW_S)
    if kind == "absence":
        default = max(3600.0, 2 * window_s)
        remembered_s = _seconds(
            found, "remembered", f"{path}.remembered", MIN_WINDOW_S, MAX_WINDOW_S, default
        )
        if selection.group_by and remembered_s <= window_s:
            raise InvalidInput(f"{path}.remembered", "has to be longer than the window")
        return Absence(selection, window_s, remembered_s)
    comparison = _COMPARISONS.get(found.comparison)
    if comparison is None:
        raise InvalidInput(f"{path}.comparison", "is required: above, at_least, below or at_most")
    if not math.isfinite(found.value):
        raise InvalidInput(f"{path}.value", "has to be a finite number")
    if kind == "threshold":
        return Threshold(selection, window_s, comparison, found.value)
    over_s = _seconds(found, "over", f"{path}.over", MIN_WINDOW_S, MAX_WINDOW_S)
    return Change(selection, window_s, over_s, comparison, found.value)


def _burn_rate(found: metrics_pb2.BurnRateCondition, selection: Selection, path: str) -> BurnRate:
    bad = _filters(found.bad, f"{path}.bad")
    if not bad:
        raise InvalidInput(f"{path}.bad", "is required: labels of what failed, such as status=UNAVAILABLE")
    if both := sorted(bad.keys() & selection.filters.keys()):
        raise InvalidInput(f"{path}.bad", f'"{both[0]}" is a filter of the selection already')
    if not (0 < found.objective < 1):
        raise InvalidInput(f"{path}.objective", "is above 0 and below 1, such as 0.999")
    if not (math.isfinite(found.least) and found.least >= 0):
        raise InvalidInput(f"{path}.least", "is at least 0")
    if not 1 <= len(found.windows) <= MAX_BURN_WINDOWS:
        raise InvalidInput(f"{path}.windows", f"has 1 to {MAX_BURN_WINDOWS}, such as 1h, 5m and 14.4")
    windows = []
    for number, window in enumerate(found.windows):
        at = f"{path}.windows[{number}]"
        long_s = _seconds(window, "long", f"{at}.long", MIN_WINDOW_S, MAX_WINDOW_S)
        short_s = _seconds(window, "short", f"{at}.short", MIN_WINDOW_S, MAX_WINDOW_S)
        if short_s >= long_s:
            raise InvalidInput(f"{at}.short", "has to be shorter than the long window")
        most = 1 / (1 - found.objective)
        if not 0 < window.factor <= most * (1 + 1e-9):
            raise InvalidInput(f"{at}.factor", f"is above 0 and at most {most:.4g}, when everything fails")
        windows.append(BurnWindow(long_s, short_s, window.factor))
    return BurnRate(selection, bad, found.objective, tuple(windows), found.least)


def _selection(message: metrics_pb2.Selection, path: str, counted: bool) -> Selection:
    """As a query is checked, with the selection's path before its fields."""
    question = metrics_pb2.QueryRequest(
        measurement=message.measurement,
        field=message.field,
        filters=message.filters,
        aggregate=metrics_pb2.AGGREGATE_SUM if counted else message.aggregate,
        percentile=0.0 if counted else message.percentile,
        group_by=message.group_by,
    )
    try:
        query = convert.to_query(question, 1 << 62)
    except InvalidInput as err:
        raise InvalidInput(f"{path}.{err.field}", err.description) from err
    for number, label in enumerate(query.group_by):
        if label in RESERVED:
            raise InvalidInput(f"{path}.group_by[{number}]", f'"{label}" is a label of every alert')
    return Selection(
        query.measurement, query.field, query.aggregate, query.percentile, query.filters, query.group_by
    )


def _filters(asked: Iterable[metrics_pb2.Filter], path: str) -> dict[str, tuple[str, ...]]:
    try:
        return {label: tuple(values) for label, values in convert.filters(asked).items()}
    except InvalidInput as err:
        raise InvalidInput(err.field.replace("filters", path, 1), err.description) from err


def _labels(message: metrics_pb2.AlertRule, condition: Condition) -> dict[str, str]:
    if len(message.labels) > MAX_LABELS:
        raise InvalidInput("rule.labels", f"has at most {MAX_LABELS}")
    for label, value in message.labels.items():
        if label in (*RESERVED, *condition.selection.group_by):
            raise InvalidInput(
                "rule.labels", f'"{label}" is a label of its alerts already; choose another name'
            )
        if not _LABEL.fullmatch(label):
            raise InvalidInput(
                "rule.labels", f'"{label}" is no name of a label: letters, digits, "_" and "."'
            )
        if len(value) > MAX_LABEL_VALUE or not value.isprintable():
            raise InvalidInput("rule.labels", f'"{label}" has at most {MAX_LABEL_VALUE} printable characters')
    return dict(sorted(message.labels.items()))


def _seconds(
    message: Any, name: str, field: str, least: float, most: float, default: float | None = None
) -> float:
    if not message.HasField(name):
        if default is None:
            raise InvalidInput(field, "is required")
        return default
    found: float = getattr(message, name).seconds + getattr(message, name).nanos * 1e-9
    if not least <= found <= most:
        raise InvalidInput(field, f"is {least:g} s to {most / 86_400:g} days")
    return found


def _from_selection(found: Selection) -> metrics_pb2.Selection:
    return metrics_pb2.Selection(
        measurement=found.measurement,
        field=found.field,
        filters=_from_filters(found.filters),
        aggregate=metrics_pb2.Aggregate.Value(f"AGGREGATE_{Aggregate(found.aggregate).name}"),
        percentile=found.percentile,
        group_by=found.group_by,
    )


def _from_filters(found: Any) -> list[metrics_pb2.Filter]:
    return [metrics_pb2.Filter(label=label, values=values) for label, values in found.items()]


def duration(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1_000_000_000))
    return made


def _ns(message: Timestamp) -> int:
    return message.seconds * 1_000_000_000 + message.nanos
