"""What changes of the alerts of a rule from one evaluation to the next: for the log, and for who watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.metrics.alerts.rules import Rule
from services.metrics.alerts.states import Alert, State
from services.metrics.points import Labels


@dataclass(frozen=True, slots=True)
class Change:
    """The alert as it is now, INACTIVE if it is gone, and the state that it was in before."""

    rule: Rule
    alert: Alert
    before: State


def changes(rule: Rule, before: Mapping[Labels, Alert], after: Mapping[Labels, Alert]) -> list[Change]:
    found = []
    for labels, alert in after.items():
        was = before[labels].state if labels in before else State.INACTIVE
        if was is not alert.state:
            found.append(Change(rule, alert, was))
    for labels, alert in before.items():
        if labels not in after:
            found.append(Change(rule, replace(alert, state=State.INACTIVE), alert.state))
    return found
