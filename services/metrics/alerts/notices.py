"""Who is told what, and when: a pure function of what fires, what was told before, and time.

Alerts of one rule are a group, and a group is told in one notification, as Alertmanager groups by alertname.
What is to be told is worked out anew each time from what fires and what was told: there is no queue that a
dead receiver could fill, and what was resolved before it came back is not told to have fired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType

from services.metrics.points import Labels

SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long a first notification waits for others of its group, how long a further one waits, and
    how often what still fires is told again."""

    wait_s: float = 5.0
    interval_s: float = 60.0
    repeat_s: float = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Notice:
    """An alert as it is told. `starts_ns` says which firing it is, `ends_ns` is 0 while it fires."""

    labels: Labels
    summary: str
    value: float
    starts_ns: int
    ends_ns: int = 0

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.labels)


@dataclass(frozen=True, slots=True)
class Group:
    """What receivers believe to fire, by fingerprint; when they were told last, and since when there is
    something new to tell (ns since 1970, 0: not)."""

    told: Mapping[str, Notice] = field(default_factory=lambda: MappingProxyType({}))
    sent_ns: int = 0
    waiting_ns: int = 0


@dataclass(frozen=True, slots=True)
class Notification:
    """`firing`: all of the group that fire and are not silenced; `resolved`: those that were told to fire."""

    group: str
    firing: tuple[Notice, ...]
    resolved: tuple[Notice, ...]


def due(
    name: str,
    group: Group,
    firing: Mapping[str, Notice],
    silenced: Mapping[str, Notice],
    now_ns: int,
    timing: Timing,
) -> tuple[Group, Notification | None]:
    """What is to be told now. A silence holds back that an alert fires, again or at all; that it is resolved
    is told to those who were told that it fires. A time ahead of now is taken for now."""
    group = replace(group, sent_ns=min(group.sent_ns, now_ns), waiting_ns=min(group.waiting_ns, now_ns))
    new = any(
        key not in group.told or group.told[key].starts_ns != notice.starts_ns
        for key, notice in firing.items()
    )
    resolved = tuple(
        replace(notice, ends_ns=max(now_ns, notice.starts_ns))
        for key, notice in sorted(group.told.items())
        if key not in firing and key not in silenced
    )
    if not new and not resolved:
        group = replace(group, waiting_ns=0)
        if not firing or now_ns - group.sent_ns < timing.repeat_s * SECOND:
            return group, None
    else:
        group = replace(group, waiting_ns=group.waiting_ns or now_ns)
        since, pause_s = group.waiting_ns, timing.wait_s
        if group.told:
            since, pause_s = group.sent_ns, timing.interval_s
        if now_ns - since < pause_s * SECOND:
            return group, None
    return group, Notification(name, tuple(firing[key] for key in sorted(firing)), resolved)


def delivered(group: Group, notification: Notification, now_ns: int) -> Group:
    """What receivers believe once they have taken it."""
    told = dict(group.told)
    for notice in notification.resolved:
        told.pop(notice.fingerprint, None)
    told |= {notice.fingerprint: notice for notice in notification.firing}
    return Group(MappingProxyType(told), now_ns, 0)


@lru_cache(8192)
def fingerprint(labels: Labels) -> str:
    """FNV-1a of 64 bits over names and values, each with a byte 255 behind it, as Prometheus has it
    (github.com/prometheus/common, model/signature.go), so that Alertmanager's is the same."""
    digest = 14695981039346656037
    for name, value in labels:
        for byte in b"\xff".join((name.encode(), value.encode(), b"")):
            digest = ((digest ^ byte) * 1099511628211) % (1 << 64)
    return f"{digest:016x}"
