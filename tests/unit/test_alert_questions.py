"""What rules ask and what they make of the answers, against the definition over plain points."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from services.core.errors import BackendUnavailable, InvalidInput
from services.metrics.alerts import convert
from services.metrics.alerts.defaults import DEFAULTS
from services.metrics.alerts.fresh import Fresh
from services.metrics.alerts.questions import Reading, questions, readings
from services.metrics.alerts.rules import (
    Absence,
    BurnRate,
    BurnWindow,
    Change,
    Comparison,
    Rule,
    Selection,
    Threshold,
    summarised,
)
from services.metrics.cardinality import LABELS
from services.metrics.points import Labels
from services.metrics.queries import Aggregate, Query, Series
from services.metrics.spool import Waiting

SECOND = 1_000_000_000
NOW = 1_790_000_000 * SECOND
BURN = "rule.burn_rate.windows"
SLO = BurnRate(
    Selection("requests", group_by=("model",)),
    {"status": ("UNAVAILABLE",)},
    0.99,
    (BurnWindow(3600, 300, 14.4), BurnWindow(21600, 1800, 6.0)),
    least=10,
)


def series(value: float, **labels: str) -> Series:
    return Series(tuple(labels.items()), ((NOW, value),))


counts = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(sorted)


@given(st.tuples(counts, counts, counts, counts))
def test_a_budget_burns_too_fast_where_both_windows_say_so(windows: tuple[list[int], ...]) -> None:
    answers = [
        [series(total, model="a")] if total else [] for bad_total in windows for total in reversed(bad_total)
    ]
    found = readings(SLO, answers).get((("model", "a"),))
    rates = {
        length: (bad / total / 0.01 if total else 0.0, total)
        for length, (bad, total) in zip((300, 1800, 3600, 21600), windows, strict=True)
    }
    expected = any(
        rates[long][1] >= 10 and rates[long][0] >= factor and rates[short][0] >= factor
        for long, short, factor in ((3600, 300, 14.4), (21600, 1800, 6.0))
    )
    assert (found is not None and found.breach) == expected


def test_a_budget_is_asked_for_all_and_for_what_failed() -> None:
    asked = questions(SLO, NOW)
    assert [(q.end_ns - q.start_ns) // SECOND for q in asked] == [
        300,
        300,
        1800,
        1800,
        3600,
        3600,
        21600,
        21600,
    ]
    assert all(q.aggregate is Aggregate.SUM and q.end_ns == NOW for q in asked)
    assert [dict(q.filters) for q in asked[:2]] == [{}, {"status": ("UNAVAILABLE",)}]


def test_a_series_that_came_before_and_does_not_now_is_absent() -> None:
    rule = Absence(Selection("host", group_by=("host",)), 60, 3600)
    found = readings(rule, [[series(3, host="a")], [series(9, host="a"), series(9, host="b")]])
    assert found == {(("host", "a"),): Reading(0.0, False), (("host", "b"),): Reading(60.0, True)}
    alone = Absence(Selection("host"), 60, 3600)
    assert readings(alone, [[]]) == {(): Reading(60.0, True)}
    assert readings(alone, [[Series((), ((NOW, 1.0),))]]) == {(): Reading(0.0, False)}
    assert len(questions(alone, NOW)) == 1


def test_a_change_is_a_second_and_wants_both_windows() -> None:
    rule = Change(Selection("q", aggregate=Aggregate.MEAN), 60, 300, Comparison.ABOVE, 0.5)
    now, before = questions(rule, NOW)
    assert now.end_ns - before.end_ns == 300 * SECOND
    assert readings(rule, [[series(400)], [series(100)]]) == {(): Reading(1.0, True)}
    assert readings(rule, [[series(400)], []]) == {}


@given(st.sampled_from(Comparison), st.floats(-5, 5), st.floats(-5, 5))
def test_a_threshold_compares(comparison: Comparison, value: float, threshold: float) -> None:
    rule = Threshold(Selection("m"), 60, comparison, threshold)
    expected = {"above": value > threshold, "at_least": value >= threshold}
    expected |= {"below": value < threshold, "at_most": value <= threshold}
    assert readings(rule, [[series(value)]]) == {(): Reading(value, expected[comparison])}


def test_rules_and_silences_are_the_same_after_a_round_trip() -> None:
    change = Change(
        Selection("q", aggregate=Aggregate.PERCENTILE, percentile=99), 60, 300, Comparison.BELOW, 1.5
    )
    for rule in (*DEFAULTS, Rule("c", change, for_s=1.5, labels={"team": "x"}, summary="{team} {value}")):
        assert convert.to_rule(convert.from_rule(rule)) == rule
    silence = alerts_pb2.Silence(reason="why", matchers=[alerts_pb2.Matcher(label="alertname", value="*")])
    silence.until.seconds = NOW // SECOND + 60
    made = convert.to_silence(silence, "1", "me", NOW)
    assert convert.restored_silence(convert.from_silence(made)) == made


def test_default_rules_ask_for_labels_that_there_are() -> None:
    assert len({rule.name for rule in DEFAULTS}) == len(DEFAULTS)
    for rule in DEFAULTS:
        selection = rule.condition.selection
        asked = {*selection.group_by, *selection.filters}
        if isinstance(rule.condition, BurnRate):
            asked |= set(rule.condition.bad)
        if selection.measurement in LABELS:
            assert asked <= LABELS[selection.measurement], rule.name


def test_a_summary_says_what_and_how_much() -> None:
    rule = Rule("r", SLO, summary="{model} burns {value} of {team}", labels={"team": "x"})
    assert summarised(rule, {"model": "a{b}"}, 14.444) == "a{b} burns 14.44 of x"
    assert summarised(replace(rule, summary=""), {}, 1) == "r: 1"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rule.name", {"name": "-x"}),
        ("rule.name", {"name": "x" * 65}),
        ("rule.condition", {"threshold": None}),
        ("rule.threshold.selection.measurement", {"threshold": {"selection": {"measurement": ""}}}),
        ("rule.threshold.selection.aggregate", {"threshold": {"selection": {"aggregate": 0}}}),
        ("rule.threshold.selection.percentile", {"threshold": {"selection": {"percentile": 5}}}),
        ("rule.threshold.selection.filters[0].values", {"threshold": {"selection": {"filters": [""]}}}),
        ("rule.threshold.selection.group_by[0]", {"threshold": {"selection": {"group_by": ["severity"]}}}),
        ("rule.threshold.window", {"threshold": {"window": "1s"}}),
        ("rule.threshold.window", {"threshold": {"window": None}}),
        ("rule.threshold.comparison", {"threshold": {"comparison": 0}}),
        ("rule.threshold.value", {"threshold": {"value": float("nan")}}),
        ("rule.severity", {"severity": 9}),
        ("rule.hold_for", {"hold_for": "700000s"}),
        ("rule.summary", {"summary": "{client} is slow"}),
        ("rule.summary", {"summary": "x" * 501}),
        ("rule.labels", {"labels": {"alertname": "x"}}),
        ("rule.labels", {"labels": {"a b": "x"}}),
        ("rule.labels", {"labels": {"team": "x" * 200}}),
        ("rule.burn_rate.bad", {"threshold": None, "burn_rate": {"selection": {"measurement": "r"}}}),
        ("rule.burn_rate.objective", {"threshold": None, "burn_rate": {"objective": 1.0}}),
        ("rule.burn_rate.windows", {"threshold": None, "burn_rate": {"windows": []}}),
        (BURN + "[0].factor", {"threshold": None, "burn_rate": {"windows": [("1h", "5m", 101)]}}),
        (BURN + "[0].short", {"threshold": None, "burn_rate": {"windows": [("5m", "1h", 2)]}}),
    ],
)  # fmt: skip
def test_a_mistake_in_a_rule_names_its_field(field: str, change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as refused:
        convert.to_rule(changed(change))
    assert refused.value.field == field


def changed(change: dict[str, object]) -> metrics_pb2.AlertRule:
    """A good rule with some fields replaced."""
    good = Rule("r", Threshold(Selection("m"), 60, Comparison.ABOVE, 1.0))
    message = convert.from_rule(good)
    lengths = {"1h": 3600, "5m": 300}
    for name, value in change.items():
        if name == "burn_rate":
            found = convert.from_rule(replace(good, condition=SLO)).burn_rate
            given = dict(value)  # type: ignore[call-overload]
            if "selection" in given:
                del found.bad[:]
            found.objective = given.get("objective", found.objective)
            if "windows" in given:
                del found.windows[:]
                for long, short, factor in given["windows"]:
                    window = found.windows.add(factor=factor)
                    window.long.seconds, window.short.seconds = lengths[long], lengths[short]
            message.burn_rate.CopyFrom(found)
        elif value is None:
            message.ClearField(name)
        elif name == "threshold":
            for key, inner in value.items():  # type: ignore[attr-defined]
                if key == "window":
                    message.threshold.ClearField("window")
                    if inner:
                        message.threshold.window.FromJsonString(inner)
                elif key == "selection":
                    for one, what in inner.items():
                        if one == "filters":
                            message.threshold.selection.filters.add(label="a")
                        elif one == "group_by":
                            message.threshold.selection.group_by.extend(what)
                        else:
                            setattr(message.threshold.selection, one, what)
                else:
                    setattr(message.threshold, key, inner)
        elif name == "labels":
            message.labels.update(value)  # type: ignore[call-overload]
        elif name == "hold_for":
            message.hold_for.FromJsonString(str(value))
        else:
            setattr(message, name, value)
    return message


def test_while_points_wait_on_disk_nothing_is_known_but_how_many() -> None:
    class Spool:
        waiting = Waiting(0, 0, 0, 0)

        def query(self, query: Query) -> list[Series]:
            return [series(1.0)]

    spool = Spool()
    asked = Fresh(spool)
    about = Rule("r", Threshold(Selection("m"), 60, Comparison.ABOVE, 1.0))
    (query,) = questions(about.condition, NOW)
    assert asked.query(query) == [series(1.0)]
    spool.waiting = replace(spool.waiting, points=7, size=900)
    with pytest.raises(BackendUnavailable, match="7 points"):
        asked.query(query)
    no_labels: Labels = ()
    of_spool = replace(query, measurement="spool", field="bytes")
    assert [(found.labels, found.values[0][1]) for found in asked.query(of_spool)] == [(no_labels, 900.0)]
