"""What an owner writes down for its successor: cells of time with counts by key, and when they count from.

A cell counts at its end, and later by how far clocks may be apart: a successor never lets go of anything too
early. Names carry the tenure, so that a successor does not write over what it has to count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lingqu.gateway.v1 import limiter_pb2 as pb
from services.gateway.limits.clock import SKEW_MS, Moment

# Milliseconds that a cell covers: admissions, tokens, and tokens of long ago.
REQUESTS_MS, TOKENS_MS, PAST_MS = 1_000, 10_000, 300_000
LENGTHS = {"r": REQUESTS_MS, "t": TOKENS_MS, "d": PAST_MS}
# How long the ledger keeps them, in seconds: the longest window, and time for the clocks to differ.
TTL_S = {"r": 90, "t": 25 * 3600, "d": 25 * 3600}
# What was used in the last second before a shard was handed over.
HANDOVER = "h"
HANDOVER_TTL_S = 60


@dataclass(slots=True)
class Cell:
    counts: dict[str, int] = field(default_factory=dict)
    reporters: dict[str, int] = field(default_factory=dict)

    def encoded(self) -> bytes:
        return pb.Cell(counts=self.counts, reporters=self.reporters).SerializeToString()

    @classmethod
    def decoded(cls, value: bytes) -> Cell:
        record = pb.Cell.FromString(value)
        return cls(dict(record.counts), dict(record.reporters))


@dataclass(frozen=True, slots=True, order=True)
class CellName:
    """`kind` is one of LENGTHS, `index` the cell's start in units of its length, `tenure` the owner's."""

    kind: str
    index: int
    tenure: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.index}/{self.tenure}"

    @classmethod
    def parsed(cls, text: str) -> CellName:
        kind, index, tenure = text.split("/")
        return cls(kind, int(index), tenure)

    def counts_from(self, now: Moment) -> int:
        """When it counts, by our steady clock."""
        return now.steady + (self.index + 1) * LENGTHS[self.kind] + SKEW_MS - now.wall


@dataclass(slots=True)
class Writes:
    """What is to be written of one shard, and to be forgotten."""

    entries: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Value and seconds to live by name."""
    forget: list[str] = field(default_factory=list)
    charged: int = 0
    """Up to and with which charge they have tokens."""

    def __len__(self) -> int:
        return len(self.entries) + len(self.forget)

    @property
    def size(self) -> int:
        """Bytes, about."""
        return sum(len(value) for value, _ in self.entries.values()) + 100 * len(self)
