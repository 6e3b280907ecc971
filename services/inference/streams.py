"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
QUEUED = 4  # items of each stream that wait for a slow reader


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    value: T


async def interleaved(runs: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What all of `runs` yield, as it comes. The others begin when the first has yielded something: what it
    has computed of a common prompt is then there for them. Leaving early, or one that fails, ends all."""
    if len(runs) == 1:
        async with aclosing(runs[0]) as run:
            async for value in run:
                yield value
        return
    came: asyncio.Queue[_Item[T] | _Ended] = asyncio.Queue(maxsize=QUEUED * len(runs))

    async def pump(run: AsyncGenerator[T, None]) -> None:
        ended = _Ended()
        try:
            async with aclosing(run):
                async for value in run:
                    await came.put(_Item(value))
        except Exception as err:
            ended = _Ended(err)
        await came.put(ended)

    tasks = [asyncio.create_task(pump(runs[0]))]
    try:
        left = len(runs)
        while left:
            item = await came.get()
            if len(tasks) < len(runs):
                tasks += [asyncio.create_task(pump(run)) for run in runs[1:]]
            if isinstance(item, _Item):
                yield item.value
            elif item.error is not None:
                raise item.error
            else:
                left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
