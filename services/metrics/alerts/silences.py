"""Alerts that nobody is to be told of until a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.core.patterns import matches

MAX_SILENCES = 200
MAX_LENGTH_S = 90 * 86_400


@dataclass(frozen=True, slots=True)
class Silence:
    """`matchers`: (label, value), all of which have to fit; "*" in a value stands for any text, and a label
    that an alert does not have is empty. Times are ns since 1970."""

    id: str
    matchers: tuple[tuple[str, str], ...]
    until_ns: int
    author: str
    reason: str
    created_ns: int

    def fits(self, labels: Mapping[str, str]) -> bool:
        return all(matches(value, labels.get(label, "")) for label, value in self.matchers)


def silenced_by(labels: Mapping[str, str], silences: Iterable[Silence], now_ns: int) -> tuple[str, ...]:
    """Ids of those that fit and have not ended."""
    return tuple(found.id for found in silences if found.until_ns > now_ns and found.fits(labels))
