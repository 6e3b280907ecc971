"""What a limiter says of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of the limit that refuses the request, or else of the one that comes next. `key` is whose limit it
    is, `admitted` the owner's time, 0 for a refusal, `wait_ms` how long until there is more."""

    admitted: int
    key: str = ""
    limit: int = 0
    window_ms: int = 0
    remaining: int = 0
    wait_ms: int = 0
    tokens: bool = False


UNLIMITED = Verdict(1)
