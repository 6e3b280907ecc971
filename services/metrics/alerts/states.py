"""What becomes of alerts when a rule was evaluated: a pure function of rule, readings, past state and time.

    inactive ─breach─► pending ─held for `for`─► firing ─clear for the hold─► resolved ─15 min─► inactive
                 ▲         │clear                   ▲                            │
                 └─────────┘                        └───────── breach, `for` ────┘

The hold is `keep_firing`, or at least ten minutes for an alert that flaps: one that has begun to fire three
times within the hour. It is then told once and stays, in place of a page for each time.

Time is a wall clock that may step. A time that lies ahead of now is taken for now, so a step back makes an
alert wait anew at most once; times that were not looked at (MAX_GAP_S) count neither as held nor as clear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from services.metrics.alerts.questions import Reading
from services.metrics.alerts.rules import Rule
from services.metrics.points import Labels

SECOND = 1_000_000_000
FLAPS = 3
FLAP_WITHIN_S = 3600.0
FLAP_HOLD_S = 600.0
RESOLVED_KEPT_S = 900.0
MAX_GAP_S = 900.0
MAX_ALERTS = 100
"""Of one rule."""


class State(StrEnum):
    """Of a series of a rule; one that has no Alert is inactive."""

    INACTIVE = "inactive"
    PENDING = "pending"
    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Alert:
    """One series of a rule that is not inactive. Times are ns since 1970; 0: not.

    `since_ns`: when the condition began to hold; `fired_ns`: when it began to fire; `clear_ns`: since when it
    does not hold while firing; `resolved_ns`: when it stopped firing; `seen_ns`: when it was last evaluated;
    `firings`: when it began to fire, lately."""

    labels: Labels
    state: State
    value: float
    since_ns: int
    fired_ns: int = 0
    clear_ns: int = 0
    resolved_ns: int = 0
    seen_ns: int = 0
    firings: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluated:
    """`overflowed`: series that breached and are not followed, since the rule has MAX_ALERTS others."""

    alerts: Mapping[Labels, Alert]
    overflowed: tuple[Labels, ...] = ()


def evaluate(
    rule: Rule, readings: Mapping[Labels, Reading] | None, before: Mapping[Labels, Alert], now_ns: int
) -> Evaluated:
    """None: the store did not answer; then nobody knows, and nothing changes."""
    if readings is None:
        return Evaluated(before)
    alerts: dict[Labels, Alert] = {}
    for labels, alert in before.items():
        reading = readings.get(labels)
        breach = reading is not None and reading.breach
        value = reading.value if reading is not None else alert.value
        if (after := _step(rule, _not_ahead(alert, now_ns), breach, value, now_ns)) is not None:
            alerts[labels] = after
    fresh = sorted(labels for labels, found in readings.items() if found.breach and labels not in before)
    overflowed = []
    for labels in fresh:
        if len(alerts) >= MAX_ALERTS and not _made_room(alerts):
            overflowed.append(labels)
            continue
        begun = Alert(labels, State.PENDING, readings[labels].value, now_ns, seen_ns=now_ns)
        alerts[labels] = _held(rule, begun, now_ns)
    return Evaluated(alerts, tuple(overflowed))


def flapping(alert: Alert, now_ns: int) -> bool:
    return len(_lately(alert, now_ns)) >= FLAPS


def _step(rule: Rule, alert: Alert, breach: bool, value: float, now_ns: int) -> Alert | None:
    gap = now_ns - alert.seen_ns > MAX_GAP_S * SECOND
    seen = replace(alert, value=value if breach else alert.value, seen_ns=now_ns)
    match alert.state, breach:
        case State.PENDING, True:
            return _held(rule, replace(seen, since_ns=now_ns) if gap else seen, now_ns)
        case State.FIRING, True:
            return replace(seen, clear_ns=0)
        case State.FIRING, False:
            return _cleared(rule, replace(seen, clear_ns=0) if gap else seen, now_ns)
        case State.RESOLVED, True:
            return _held(rule, replace(seen, state=State.PENDING, since_ns=now_ns, clear_ns=0), now_ns)
        case _:
            return _forgotten(seen, now_ns)


def _held(rule: Rule, alert: Alert, now_ns: int) -> Alert:
    if now_ns - alert.since_ns < rule.for_s * SECOND:
        return alert
    firings = (*_lately(alert, now_ns), now_ns)[-FLAPS:]
    return replace(alert, state=State.FIRING, fired_ns=now_ns, resolved_ns=0, firings=firings)


def _cleared(rule: Rule, alert: Alert, now_ns: int) -> Alert:
    hold_s = max(rule.keep_firing_s, FLAP_HOLD_S) if flapping(alert, now_ns) else rule.keep_firing_s
    since = alert.clear_ns or now_ns
    if now_ns - since < hold_s * SECOND:
        return replace(alert, clear_ns=since)
    return replace(alert, state=State.RESOLVED, clear_ns=0, resolved_ns=now_ns)


def _forgotten(alert: Alert, now_ns: int) -> Alert | None:
    """Resolved, or pending and clear again: kept to be seen, and for as long as it counts for flapping."""
    firings = _lately(alert, now_ns)
    ended = alert.resolved_ns
    if not ended or (now_ns - ended >= RESOLVED_KEPT_S * SECOND and not firings):
        return None
    return replace(alert, state=State.RESOLVED, firings=firings)


def _lately(alert: Alert, now_ns: int) -> tuple[int, ...]:
    return tuple(at for at in alert.firings if now_ns - at < FLAP_WITHIN_S * SECOND)


def _not_ahead(alert: Alert, now_ns: int) -> Alert:
    """With no time ahead of a clock that was set back; when it fired says which firing it is, and stays."""
    times = (alert.since_ns, alert.clear_ns, alert.resolved_ns, alert.seen_ns, *alert.firings)
    if max(times) <= now_ns:
        return alert
    return replace(
        alert,
        since_ns=min(alert.since_ns, now_ns),
        clear_ns=min(alert.clear_ns, now_ns),
        resolved_ns=min(alert.resolved_ns, now_ns),
        seen_ns=min(alert.seen_ns, now_ns),
        firings=tuple(min(at, now_ns) for at in alert.firings),
    )


def _made_room(alerts: dict[Labels, Alert]) -> bool:
    """Forgets the alert that was resolved first, if there is one."""
    ended = [alert for alert in alerts.values() if alert.state is State.RESOLVED]
    if not ended:
        return False
    del alerts[min(ended, key=lambda alert: (alert.resolved_ns, alert.labels)).labels]
    return True
