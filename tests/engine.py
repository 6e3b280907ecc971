"""What the text engine of a running suite says of its work."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL
from services.core.discovery import VersionKey
from services.inference.backends import wire
from services.inference.triton import Triton, command_request
from tests.waiting import until


def session_secret(suite: Suite) -> str:
    """What only inference knows."""
    return (suite.layout.state / "triton" / "session.secret").read_text()


async def engine_counts(suite: Suite) -> dict[str, int]:
    """What the text engine has done so far, asked of it in Triton."""
    engine = Triton(suite.triton)
    secret = session_secret(suite)

    async def requests() -> AsyncIterator[Any]:
        yield command_request(
            VersionKey(TEXT_MODEL, 1), "stats", wire.dump(wire.Command("stats", "", secret))
        )

    async for answer in engine.stream(requests()):
        raw = answer.infer_response.raw_output_contents[0]
        await engine.close()
        counts: dict[str, int] = json.loads(raw[4:])
        return counts
    raise AssertionError("no answer")


async def idle(suite: Suite) -> int:
    """Wait until the engine computes nothing; the tokens it has made by then."""

    async def ended() -> dict[str, int] | None:
        counts = await engine_counts(suite)
        return counts if not counts["sequences"] else None

    return (await until(ended, "the engine is idle", timeout_s=10))["tokens"]
