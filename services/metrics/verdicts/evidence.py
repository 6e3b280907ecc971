"""Evidence that may be looked at after every request: e-processes.

Such a number starts at 1, and as long as a hypothesis holds, its expected value is at most 1 whenever one
stops to look. So the chance that it ever reaches 1/a is at most a, however often it is looked at: Ville's
inequality (Ramdas, Grünwald, Vovk, Shafer 2023, "Game-theoretic statistics and safe anytime-valid
inference").

Here it is kept as a logarithm. Several alternatives are bet on side by side, each from the beginning and,
with what was kept back, again from every later moment: what goes wrong after a good hour is noticed as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# No block counts more than this, so that one burst decides nothing.
MOST = math.log(10.0)
# How far from the hypothesis the alternatives are, as shares of the way to the worst that there can be.
EXCESSES = (0.02, 0.1, 0.4, 0.95)
BETS = (0.05, 0.2, 0.5, 0.9)
_HALF, _NEVER = math.log(0.5), -1e300


@dataclass(slots=True)
class Mixture:
    """The means of products, one for each alternative, over all moments at which they may have begun: half of
    the stake is on the first block, the rest on block n by 1/(n (n + 1))."""

    logs: list[float]
    blocks: int = 0

    @classmethod
    def of(cls, alternatives: int) -> Mixture:
        return cls([_NEVER] * alternatives)

    def add(self, factors: Sequence[float]) -> None:
        """One block: the logarithm of each alternative's e-value."""
        n = self.blocks
        stake = _HALF - (math.log(n * (n + 1)) if n else 0.0)
        self.logs = [_sum(log, stake) + min(f, MOST) for log, f in zip(self.logs, factors, strict=True)]
        self.blocks += 1

    @property
    def log(self) -> float:
        """The logarithm of the e-process."""
        unstaked = _HALF - math.log(self.blocks) if self.blocks else 0.0
        total = unstaked
        for log in self.logs:
            total = _sum(total, log - math.log(len(self.logs)))
        return total


@dataclass(frozen=True, slots=True)
class Tally:
    """Of so many requests, so many were of the kind that is counted."""

    requests: int = 0
    hits: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.requests + other.requests, self.hits + other.hits)

    @property
    def share(self) -> float:
        return self.hits / self.requests if self.requests else math.nan


@dataclass(slots=True)
class Excess:
    """Evidence against: hits are at most `allowed` (a share) more frequent in one stream than in another. How
    frequent they are may change over time, as long as it does so in both. `usual` is what is expected of the
    other stream before it was seen. With 1 allowed there is never any."""

    allowed: float
    usual: float
    mixture: Mixture = field(default_factory=lambda: Mixture.of(len(EXCESSES)))
    before: Tally = Tally()
    after: Tally = Tally()

    def add(self, before: Tally, after: Tally) -> None:
        """What happened since the last time in the stream of comparison, and in the one that is judged."""
        if after.requests and self.allowed < 1:
            usual = (self.before.hits + self.usual) / (self.before.requests + 1)
            self.mixture.add([log_e(before, after, usual, self.allowed, part) for part in EXCESSES])
        self.before += before
        self.after += after


def log_e(before: Tally, after: Tally, usual: float, allowed: float, part: float) -> float:
    """The logarithm of the e-value of a block, for one alternative: `usual` before, and of the way from there
    to always the share `part` more than allowed (Turner, Ly, Grünwald 2024, "Generic e-variables for exact
    sequential k-sample tests that allow for optional stopping").

    It is the ratio of likelihoods between the alternative (a, b) and the member (r, s = r + allowed) of the
    hypothesis that is nearest to it by Kullback and Leibler, where n A + m B = 0 for A = (a - r)/(r (1 - r)),
    B = (b - s)/(s (1 - s)) > 0. For true shares p and q ≤ p + allowed its expected value is
    (1 + (p - r) A)^n (1 + (q - s) B)^m ≤ exp((p - r) (n A + m B)) = 1."""
    least = 1e-9
    r_most = 1 - allowed - least
    a = min(max(usual, least), r_most)
    b = a + allowed + part * (1 - a - allowed - least)
    n, m = before.requests, after.requests
    r = _nearest(a, b, n, m, allowed)
    s = r + allowed
    return (
        after.hits * math.log(b / s)
        + (m - after.hits) * math.log((1 - b) / (1 - s))
        + before.hits * math.log(a / r)
        + (n - before.hits) * math.log((1 - a) / (1 - r))
    )


def _nearest(a: float, b: float, n: int, m: int, allowed: float) -> float:
    """Between a, where the first term of n A + m B is 0, and b - allowed, where the second is."""
    low, high = a, b - allowed
    for _ in range(50):
        r = (low + high) / 2
        s = r + allowed
        if n * (a - r) / (r * (1 - r)) + m * (b - s) / (s * (1 - s)) > 0:
            low = r
        else:
            high = r
    return (low + high) / 2


@dataclass(slots=True)
class Mean:
    """Evidence against: the mean of values in [0, 1] is at most `allowed` (Waudby-Smith, Ramdas 2024,
    "Estimating means of bounded random variables by betting"). With 1 allowed there is never any."""

    allowed: float
    mixture: Mixture = field(default_factory=lambda: Mixture.of(len(BETS)))
    number: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        value = min(max(value, 0.0), 1.0)
        most = max(self.allowed, 1e-9)
        self.mixture.add([math.log1p(bet / most * (value - most)) for bet in BETS])
        self.number += 1
        self.total += value

    @property
    def mean(self) -> float:
        return self.total / self.number if self.number else math.nan


def _sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))"""
    high, low = (a, b) if a > b else (b, a)
    return high + math.log1p(math.exp(low - high))
