"""A rollout under judgement: what both versions did since it began, and whether one does worse.

Five questions are asked, each at a fifth of the rate of false alarms: do requests fail more often, and copies
of the other version's requests; are requests slower than the usual one and than the slow ones of the other
version, each by a factor; and do answers to copies differ by more than is allowed?
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from services.metrics.verdicts.answers import Kind, Pair
from services.metrics.verdicts.evidence import Excess, Mean, Tally

QUESTIONS = 5
# Of the other version's latest requests; fewer than LEAST say nothing of what is usual.
LATENCIES, LEAST = 500, 40
# Whose answers are compared once only: the same text again is no new evidence.
INPUTS = 8192
USUAL_ERRORS = 0.005
# With more evidence than this, and less than for FAIL, there is no PASS yet.
SUSPICIOUS = math.log(10.0)
# So many more of its requests than of the other's may be slower than the bound.
SLOWER = {0.5: 0.05, 0.95: 0.02}


NOTHING = Tally()


class Opinion(enum.Enum):
    NONE = "not yet"
    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Terms:
    """What is allowed. `slowdown` is a factor; the others are shares and differences, 0 to 1, where 1 means
    that it is not asked. `least`: of how many requests or copies of a step a PASS has to be."""

    false_alarms: float = 0.01
    error_increase: float = 0.01
    slowdown: float = 1.25
    label_disagreement: float = 0.02
    cosine_distance: float = 0.01
    token_divergence: float = 0.5
    least: int = 100

    def difference(self, kind: Kind) -> float:
        match kind:
            case Kind.LABELS:
                return self.label_disagreement
            case Kind.VECTORS:
                return self.cosine_distance
            case Kind.TOKENS:
                return self.token_divergence

    @property
    def enough(self) -> float:
        """The logarithm of the evidence that makes a FAIL."""
        return math.log(QUESTIONS / self.false_alarms)


@dataclass(slots=True)
class Side:
    """One version: its requests and errors, how long its latest took (seconds), and what is not yet in the
    evidence. `slow`: requests and how many took longer than the bound, by quantile."""

    total: Tally = NOTHING
    new: Tally = NOTHING
    slow: dict[float, Tally] = field(default_factory=dict)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES))

    def take(self, failed: bool, duration_s: float | None, bounds: Mapping[float, float]) -> None:
        one = Tally(1, int(failed))
        self.new += one
        self.total += one
        if failed or duration_s is None:
            return
        self.latencies.append(duration_s)
        for quantile, bound in bounds.items():
            self.slow[quantile] = self.slow.get(quantile, NOTHING) + Tally(1, int(duration_s > bound))

    def drained(self) -> tuple[Tally, dict[float, Tally]]:
        new, slow = self.new, self.slow
        self.new, self.slow = NOTHING, {}
        return new, slow

    def quantile(self, share: float) -> float:
        """Seconds, of the latest; NaN where there are none."""
        return float(np.quantile(self.latencies, share)) if self.latencies else math.nan


class Trial:
    """Of one rollout; `terms` stay. What comes in counts once `close` has made a block of it."""

    def __init__(self, rollout: str, model: str, version: int, before: int, terms: Terms) -> None:
        self.rollout, self.model, self.version, self.before = rollout, model, version, before
        self.terms = terms
        self.errors = Excess(terms.error_increase, USUAL_ERRORS)
        self.copies = Excess(terms.error_increase, USUAL_ERRORS)
        self.slower = {q: Excess(allowed, 1 - q) for q, allowed in SLOWER.items()}
        self.differing: dict[Kind, Mean] = {}
        self.sides = {before: Side(), version: Side()}
        self.step = 0
        self.step_samples = 0
        self.incomparable = 0
        self._new_copies = NOTHING, NOTHING
        self._bounds: dict[float, float] = {}
        self._inputs: OrderedDict[int, None] = OrderedDict()

    def take_request(self, version: int, failed: bool, duration_s: float | None) -> None:
        """One that ended, of either version."""
        side = self.sides.get(version)
        if side is None:
            return
        side.take(failed, duration_s, self._bounds)
        if version == self.version:
            self.step_samples += 1

    def take_pair(self, pair: Pair) -> None:
        """Of the version's answer to a copy of a request of the other."""
        if (pair.version, pair.before) != (self.version, self.before):
            return
        if pair.input in self._inputs:
            self._inputs.move_to_end(pair.input)
            return
        self._inputs[pair.input] = None
        if len(self._inputs) > INPUTS:
            self._inputs.popitem(last=False)
        self.step_samples += 1
        before, after = self._new_copies
        self._new_copies = before + Tally(1, pair.failed_before), after + Tally(1, pair.failed)
        if pair.kind is not None and pair.difference is not None:
            self.differing.setdefault(pair.kind, Mean(self.terms.difference(pair.kind))).add(pair.difference)
        elif not (pair.failed or pair.failed_before):
            self.incomparable += 1

    def at(self, step: int) -> None:
        """The step in progress; evidence stays, what a PASS needs begins anew."""
        if step != self.step:
            self.step, self.step_samples = step, 0

    def close(self) -> None:
        """What came in since the last time is one block."""
        before, slow_before = self.sides[self.before].drained()
        after, slow_after = self.sides[self.version].drained()
        self.errors.add(before, after)
        self.copies.add(*self._new_copies)
        self._new_copies = NOTHING, NOTHING
        for quantile, excess in self.slower.items():
            excess.add(slow_before.get(quantile, NOTHING), slow_after.get(quantile, NOTHING))
        usual = self.sides[self.before]
        if len(usual.latencies) >= LEAST and self.terms.slowdown:
            self._bounds = {q: usual.quantile(q) * self.terms.slowdown for q in SLOWER}

    def opinion(self) -> tuple[Opinion, str]:
        """And why."""
        log, why = max(self._evidence(), key=lambda found: found[0])
        if log >= self.terms.enough:
            return Opinion.FAIL, why
        if self.step_samples < self.terms.least or log >= SUSPICIOUS:
            return Opinion.NONE, why if log >= SUSPICIOUS else ""
        return Opinion.PASS, f"no worse in {self.step_samples} requests"

    def figures(self) -> dict[str, float]:
        """What was measured since the rollout began; what was not is left out. `evidence`: the logarithm of
        what there is, as a share of what makes a FAIL."""
        before, after = self.sides[self.before], self.sides[self.version]
        found = {
            "error_rate": after.total.share,
            "error_rate_before": before.total.share,
            "latency_p50_s": after.quantile(0.5),
            "latency_p50_before_s": before.quantile(0.5),
            "latency_p95_s": after.quantile(0.95),
            "latency_p95_before_s": before.quantile(0.95),
            "evidence": max(0.0, max(log for log, _ in self._evidence())) / self.terms.enough,
        }
        for kind, mean in self.differing.items():
            found[str(kind)] = mean.mean if kind is Kind.TOKENS else 1 - mean.mean
            found["compared"] = float(mean.number)
        if self.incomparable:
            found["incomparable"] = float(self.incomparable)
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _evidence(self) -> Iterator[tuple[float, str]]:
        for what, errors in (("requests", self.errors), ("copied requests", self.copies)):
            yield (
                errors.mixture.log,
                f"{errors.after.share:.1%} of {errors.after.requests} {what} failed, "
                f"{errors.before.share:.1%} of {errors.before.requests} of version {self.before}",
            )
        for quantile, excess in self.slower.items():
            yield (
                excess.mixture.log,
                f"{excess.after.share:.0%} of {excess.after.requests} requests took more than "
                f"{self.terms.slowdown:g} times what {quantile:.0%} of version {self.before}'s take at most, "
                f"{excess.before.share:.0%} of version {self.before}'s did",
            )
        for kind, mean in self.differing.items():
            yield mean.mixture.log, f"{_differ(kind, mean)} in {mean.number} requests that both answered"


def _differ(kind: Kind, mean: Mean) -> str:
    match kind:
        case Kind.LABELS:
            return f"labels agree to {1 - mean.mean:.1%}"
        case Kind.VECTORS:
            return f"vectors have a cosine of {1 - mean.mean:.4f}"
        case Kind.TOKENS:
            return f"{mean.mean:.0%} of the tokens come behind the first that differs"
