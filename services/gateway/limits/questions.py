"""What control planes ask each other, and its form on the wire."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lingqu.gateway.v1 import limiter_pb2 as pb
from services.core.errors import InvalidInput
from services.gateway.limits.verdicts import Verdict


class Side(enum.IntEnum):
    """Whose limits are asked for: the client's, and those of the client for the model; or the model's."""

    CLIENT = 1
    MODEL = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens by (client, model), as `reporter` has counted them; `sequence` ascends."""

    reporter: str
    sequence: int
    usages: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """Whether a request may pass; or with `take_back`, that one admitted then has not; or a charge."""

    client: str
    model: str
    side: Side
    take_back: int = 0
    charge: Batch | None = None

    def to_record(self) -> pb.Question:
        side = pb.SIDE_MODEL if self.side is Side.MODEL else pb.SIDE_CLIENT
        record = pb.Question(client=self.client, model=self.model, side=side, take_back=self.take_back)
        if self.charge is not None:
            record.charge.reporter = self.charge.reporter
            record.charge.sequence = self.charge.sequence
            for (client, model), tokens in self.charge.usages.items():
                record.charge.usages.add(client=client, model=model, tokens=tokens)
        return record

    @classmethod
    def of(cls, record: pb.Question) -> Question:
        """Raises InvalidInput."""
        if record.side not in (pb.SIDE_CLIENT, pb.SIDE_MODEL):
            raise InvalidInput("questions.side", "is required")
        charge = None
        if record.HasField("charge"):
            usages = {(u.client, u.model): u.tokens for u in record.charge.usages}
            charge = Batch(record.charge.reporter, record.charge.sequence, usages)
        return cls(record.client, record.model, Side(record.side), record.take_back, charge)


def to_record(verdict: Verdict) -> pb.Verdict:
    return pb.Verdict(
        state=pb.Verdict.STATE_ADMITTED if verdict.admitted else pb.Verdict.STATE_REFUSED,
        admitted=verdict.admitted,
        key=verdict.key,
        limit=verdict.limit,
        window_ms=verdict.window_ms,
        remaining=verdict.remaining,
        wait_ms=verdict.wait_ms,
        tokens=verdict.tokens,
    )


def to_verdict(record: pb.Verdict) -> Verdict:
    return Verdict(
        record.admitted,
        record.key,
        record.limit,
        record.window_ms,
        record.remaining,
        record.wait_ms,
        record.tokens,
    )
