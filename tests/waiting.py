"""Waiting for a condition with a deadline, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(
    condition: Callable[[], T | Awaitable[T]], what: str, timeout_s: float = 15.0, every_s: float = 0.05
) -> T:
    """The condition's first true value. Fails with `what` when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value  # type: ignore[return-value]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        await asyncio.sleep(every_s)


async def forever() -> None:
    """What hangs: ends only when it is cancelled."""
    await asyncio.Event().wait()


async def pause(seconds: float, because: str) -> None:
    """Let time pass where its passing is what is tested; `because` says so to the reader."""
    assert because
    await asyncio.sleep(seconds)
