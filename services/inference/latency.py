"""How long a version takes for its golden examples, against what its manifest allows."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.inference.artifact import GoldenText, LatencyBudget
from services.inference.backends.jobs import Sampling
from services.inference.text import TextModel

TRIES = 5  # the best counts: what else the machine does must not decide


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds; what was not measured is 0."""

    first_token_ms: float = 0.0
    per_token_ms: float = 0.0
    request_ms: float = 0.0


def exceeded(found: Latency, budget: LatencyBudget) -> str | None:
    """What is slower than the budget allows, with figures; None if nothing is."""
    names = {
        "first_token_ms": "the first token took",
        "per_token_ms": "a token took",
        "request_ms": "a request took",
    }
    over = [
        f"{words} {getattr(found, name):.1f} ms, {getattr(budget, name):g} ms are allowed"
        for name, words in names.items()
        if 0 < getattr(budget, name) < getattr(found, name)
    ]
    return "; ".join(over) or None


async def of_text(model: TextModel, example: GoldenText, tries: int = TRIES) -> Latency:
    """Best of `tries` of one example, one at a time. The engine is warm: it has just computed it."""
    sampling = Sampling(max_tokens=len(example.token_ids))
    first, each = [], []
    for _ in range(tries):
        begun = time.perf_counter()
        at: list[float] = []
        tokens = 0
        async for step in model.session.generate(list(example.prompt_ids), sampling):
            if step.tokens:
                at.append(time.perf_counter())
                tokens += len(step.tokens)
        if at:
            first.append(at[0] - begun)
            each.append((at[-1] - at[0]) / max(1, tokens - 1))
    return Latency(1000 * min(first, default=0.0), 1000 * min(each, default=0.0))


async def of_requests(request: Callable[[str], Awaitable[object]], text: str, tries: int = TRIES) -> Latency:
    """Best of `tries` of one text, alone; each a little different, so that no cache answers."""
    took = []
    for number in range(tries):
        begun = time.perf_counter()
        await request(f"{number} {text}")
        took.append(time.perf_counter() - begun)
    return Latency(request_ms=1000 * min(took))
