"""A breaker for each version of a model: opens when too many of its requests fail or take too long, and tries
again by itself.

    CLOSED ──── too many failures, or too slow ────► OPEN ──── held off for a while ────► HALF_OPEN
       ▲                                               ▲                                      │
       │                                               └──────────────── still bad ───────────┤
       └────────────────────────────── good, or nobody came ──────────────────────────────────┘

Pure: what Envoys report goes in, with the time; loads.py brings it and routes.py acts on it. What one replica
among several does wrong is the business of outlier detection (protection.py).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from services.core.discovery import Protection
from services.core.errors import BreakerOpen
from services.gateway.view import Target, View

# What is judged: the reports of the last seconds.
WINDOW_S = 10.0
# How long an open breaker holds requests off, first and at most; it doubles from one time to the next.
HOLD_S, HOLD_MOST_S = 2.0, 30.0
# In 100, how many requests a half-open breaker lets through, and how many of them suffice to judge.
PROBES_PERCENT = 20
PROBES = 5

# The status by which the listener knows a request that a breaker refuses; no client sees it.
REFUSED = 510
REFUSAL = BreakerOpen(
    "too many requests to the model have failed or taken too long lately; it is tried again soon"
)

VersionId: TypeAlias = tuple[str, int]


class Phase(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a breaker opens: with more failures than `error_percent` of at least `min_requests` in WINDOW_S,
    or with requests taking longer than `latency_s` on the average (0: however long)."""

    error_percent: int = 50
    min_requests: int = 20
    latency_s: float = 0.0
    off: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What became of the requests to a version in one reporting interval. `busy_s` is the time that requests
    were in progress, over all of them: what they take is this divided by how many ended (Little's law).
    `running` are those in progress at its end."""

    ended: int = 0
    failed: int = 0
    busy_s: float = 0.0
    running: int = 0

    def __add__(self, other: Load) -> Load:
        """Of the same interval."""
        return Load(
            self.ended + other.ended,
            self.failed + other.failed,
            self.busy_s + other.busy_s,
            self.running + other.running,
        )


@dataclass(frozen=True, slots=True)
class Breaker:
    """`since` is when it came into its phase, `until` when an open one tries again, `holds` how often it has
    opened without having been good for a while, `reason` why it opened last."""

    phase: Phase = Phase.CLOSED
    since: float = 0.0
    until: float = 0.0
    holds: int = 0
    reason: str = ""
    recent: tuple[tuple[float, Load], ...] = ()

    @property
    def admits_percent(self) -> int:
        return {Phase.CLOSED: 100, Phase.OPEN: 0, Phase.HALF_OPEN: PROBES_PERCENT}[self.phase]


def advanced(breaker: Breaker, load: Load, now: float, rule: Rule) -> Breaker:
    """The breaker after a report. `now` never goes back."""
    if rule.off:
        return Breaker()
    if breaker.phase is Phase.OPEN:  # what still ends began before
        over = now >= breaker.until
        return replace(breaker, phase=Phase.HALF_OPEN, since=now, until=0.0) if over else breaker
    recent = tuple(entry for entry in breaker.recent if entry[0] > now - WINDOW_S)
    breaker = replace(breaker, recent=(*recent, (now, load)) if load != Load() else recent)
    seen = sum((found for _, found in breaker.recent), Load())
    half = breaker.phase is Phase.HALF_OPEN
    if wrong := _wrong(seen, load.running, rule, PROBES if half else rule.min_requests):
        held = min(HOLD_S * 2**breaker.holds, HOLD_MOST_S)
        return Breaker(Phase.OPEN, now, now + held, min(breaker.holds + 1, 8), wrong)
    if half and (seen.ended >= PROBES or now >= breaker.since + WINDOW_S):
        return Breaker(Phase.CLOSED, now, 0.0, breaker.holds, breaker.reason)
    if not half and breaker.holds and now >= breaker.since + HOLD_MOST_S:
        return replace(breaker, holds=0, reason="")
    return breaker


def _wrong(seen: Load, running: int, rule: Rule, enough: int) -> str:
    if seen.ended >= max(enough, 1) and seen.failed * 100 > rule.error_percent * seen.ended:
        return f"{seen.failed} of {seen.ended} requests failed"
    # Requests that hang never end, but they run.
    took = seen.busy_s / max(seen.ended, 1)
    if rule.latency_s and seen.ended + running >= max(enough, 1) and took > rule.latency_s:
        return f"requests take {took:.3g} s on the average, {rule.latency_s:.3g} s are allowed"
    return ""


class Breakers:
    """All breakers of one control plane. Each judges by what the Envoys report that it configures, and begins
    anew when the replicas are others than before: what failed may be gone."""

    def __init__(self) -> None:
        self._known: dict[VersionId, tuple[Target, Breaker]] = {}

    def of(self, model: str, version: int) -> Breaker:
        return self._known[model, version][1] if (model, version) in self._known else Breaker()

    def advance(
        self, loads: Mapping[VersionId, Load], view: View, now: float
    ) -> list[tuple[Target, Breaker]]:
        """Those whose phase has changed. `view` is what the Envoys have been told last."""
        protections = {model.name: model.protection for model in view.models}
        changed: list[tuple[Target, Breaker]] = []
        known, self._known = self._known, {}
        for target in view.targets:
            version = (target.model, target.version)
            found, before = known.get(version, (target, Breaker()))
            if _replicas(found) != _replicas(target):
                before = Breaker()
            load, rule = loads.get(version, Load()), rule_of(protections.get(target.model, Protection()))
            after = advanced(before, load, now, rule)
            self._known[version] = (target, after)
            if after.phase is not before.phase:
                changed.append((target, after))
        return changed

    def applied(self, view: View) -> View:
        """The view with what each version's breaker admits."""
        return replace(view, targets=tuple(self._judged(target) for target in view.targets))

    def _judged(self, target: Target) -> Target:
        found, breaker = self._known.get((target.model, target.version), (target, Breaker()))
        if breaker.phase is Phase.CLOSED or _replicas(found) != _replicas(target):
            return target
        return replace(target, admits=breaker.admits_percent)


def rule_of(asked: Protection) -> Rule:
    return Rule(asked.error_percent or 50, asked.min_requests or 20, asked.latency_s, asked.no_breaker)


def _replicas(target: Target) -> tuple[tuple[str, ...], ...]:
    return target.text_endpoints, target.tensor_endpoints, target.rest_endpoints


def shares(percents: Iterable[tuple[int, int]]) -> tuple[list[int], int]:
    """From (share of the traffic, what its breaker admits in 100) of each version: what each gets, and what
    is refused. While a breaker is closed, others' requests go there and nothing is refused."""
    given = list(percents)
    got = [share * admits for share, admits in given]
    if any(admits == 100 and share for share, admits in given):
        return got, 0
    return got, 100 * sum(share for share, _ in given) - sum(got)
