"""How results are printed: medians over passes, the spread, and the ratio that was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio or difference that must be reached; `at_least` False: at most."""

    name: str
    value: float
    bound: float
    at_least: bool = True
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "met" if self.met else "MISSED"
        return f"  {self.name:<58} {self.value:7.2f} {self.unit:<3} {sign} {self.bound:g}  {verdict}"


def judged(targets: Sequence[Target]) -> int:
    """Prints them; what the program is to end with: 1 if one is missed."""
    print("\ntargets")
    for target in targets:
        print(target.line())
    return 0 if all(target.met for target in targets) else 1


def row(name: str, values: Sequence[float], unit: str) -> str:
    """One line of a table: the median and the range of all passes."""
    middle = statistics.median(values)
    return (
        f"  {name:<44} {middle:10,.2f} {unit:<8} ({min(values):,.2f} – {max(values):,.2f}, n={len(values)})"
    )


def ratios(ours: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Pass by pass: what drifts between passes cancels."""
    return [a / b for a, b in zip(ours, reference, strict=True)]


def ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(ours, reference))
