"""What an InfluxDB says about lines that it did not take."""

from __future__ import annotations

import re

from services.metrics.stores.influxhttp import Answer

_DROPPED = re.compile(r"dropped=(\d+)$")
_UNPARSED = re.compile(r"(?:^partial write: |\n)unable to parse '")


def refused_of(answer: Answer) -> int | None:
    """How many lines were refused, all others being kept; None if the answer does not tell: then all may have
    been refused because of one.

    1.x: "partial write: unable to parse '…': …\\nunable to parse … dropped=0", or "partial write: points
    beyond retention policy dropped=3". 2.x: 400 for all because of one line, 422 with dropped= for what a
    shard does not take. 3.x: an object for each line."""
    document = answer.document
    if isinstance(document, dict) and isinstance(lines := document.get("data"), list):
        return len(lines)
    text = answer.error
    if "partial write" not in text:
        return None
    unparsed = len(_UNPARSED.findall(text))
    dropped = _DROPPED.search(text)
    number = unparsed + (int(dropped[1]) if dropped else 0)
    return number or None
