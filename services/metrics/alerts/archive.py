"""What outlives a restart: rules and silences in one file, where alerts are and what was told in another.

A file that cannot be read is set aside (documents.py): better alerts anew than none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from services.core.errors import LingquError
from services.metrics import documents
from services.metrics.alerts import convert
from services.metrics.alerts.notices import Group, Notice
from services.metrics.alerts.rules import Rule
from services.metrics.alerts.silences import Silence
from services.metrics.alerts.states import Alert, State
from services.metrics.points import Labels

log = logging.getLogger(__name__)

RULES, STATE = "rules.json", "state.json"
T = TypeVar("T")


@dataclass(slots=True)
class Wanted:
    """What somebody has asked for: rules by name, default rules that are disabled, silences by id."""

    rules: dict[str, Rule] = field(default_factory=dict)
    disabled: set[str] = field(default_factory=set)
    silences: dict[str, Silence] = field(default_factory=dict)


@dataclass(slots=True)
class Known:
    """By name of the rule: its alerts, and what was told."""

    alerts: dict[str, Mapping[Labels, Alert]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)


class Archive:
    """Calls block, and come one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def wanted(self) -> Wanted:
        return documents.read(self._folder / RULES, _wanted, Wanted())

    def known(self) -> Known:
        return documents.read(self._folder / STATE, _known, Known())

    def keep_wanted(self, wanted: Wanted) -> None:
        """Raises LingquError."""
        body = {
            "rules": [_plain(convert.from_rule(rule)) for rule in wanted.rules.values()],
            "disabled": sorted(wanted.disabled),
            "silences": [_plain(convert.from_silence(silence)) for silence in wanted.silences.values()],
        }
        documents.write(self._folder / RULES, body)

    def keep_known(self, known: Known) -> None:
        """Raises LingquError."""
        body = {
            "alerts": {
                name: [asdict(alert) for alert in alerts.values()] for name, alerts in known.alerts.items()
            },
            "groups": {
                name: {
                    "told": [asdict(notice) for notice in group.told.values()],
                    "sent_ns": group.sent_ns,
                    "waiting_ns": group.waiting_ns,
                }
                for name, group in known.groups.items()
            },
        }
        documents.write(self._folder / STATE, body)


def _plain(message: Any) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True)


def _wanted(body: Any) -> Wanted:
    rules = _each(body["rules"], lambda raw: convert.to_rule(ParseDict(raw, metrics_pb2.AlertRule())))
    silences = _each(
        body["silences"], lambda raw: convert.restored_silence(ParseDict(raw, alerts_pb2.Silence()))
    )
    return Wanted(
        {rule.name: rule for rule in rules},
        {str(name) for name in body["disabled"]},
        {silence.id: silence for silence in silences},
    )


def _each(raw: Iterable[Any], read: Callable[[Any], T]) -> list[T]:
    """All that are well: one of a later version does not take the others with it."""
    found = []
    for one in raw:
        try:
            found.append(read(one))
        except (LingquError, ParseError) as err:
            log.error("left out of the rules of alerts: %s: %.300s", err, one)  # noqa: TRY400
    return found


def _known(body: Any) -> Known:
    return Known(
        {
            str(name): {alert.labels: alert for alert in map(_alert, alerts)}
            for name, alerts in body["alerts"].items()
        },
        {
            str(name): Group(
                {notice.fingerprint: notice for notice in map(_notice, group["told"])},
                int(group["sent_ns"]),
                int(group["waiting_ns"]),
            )
            for name, group in body["groups"].items()
        },
    )


def _alert(raw: Any) -> Alert:
    return Alert(
        _labels(raw["labels"]),
        State(raw["state"]),
        float(raw["value"]),
        int(raw["since_ns"]),
        int(raw["fired_ns"]),
        int(raw["clear_ns"]),
        int(raw["resolved_ns"]),
        int(raw["seen_ns"]),
        tuple(int(at) for at in raw["firings"]),
    )


def _notice(raw: Any) -> Notice:
    return Notice(
        _labels(raw["labels"]),
        str(raw["summary"]),
        float(raw["value"]),
        int(raw["starts_ns"]),
        int(raw["ends_ns"]),
    )


def _labels(raw: Any) -> Labels:
    return tuple((str(name), str(value)) for name, value in raw)
