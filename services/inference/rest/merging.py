"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """All items in the order in which they come. The first error ends all streams and is raised; so does
    leaving early."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for each in only:
                yield each
        return
    # A place for each: a stream waits until its item was taken.
    items: asyncio.Queue[T | BaseException | None] = asyncio.Queue(len(streams))

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        ending: BaseException | None = None
        try:
            async with aclosing(stream) as deltas:
                async for item in deltas:
                    await items.put(item)
        except Exception as err:
            ending = err
        await items.put(ending)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
