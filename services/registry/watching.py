"""What all watch RPCs have in common: resuming, marking, encoding once for all, and cutting off the slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from services.core.errors import InvalidInput, SlowWatcher
from services.core.interceptors import Context
from services.registry.mirror import Mirror, Resume, Update

# A watcher that takes nothing for this long is cut off, whether or not its buffer is full.
GUARD_S = 1.0
STALL_S = 5.0


class Feed:
    """The stream of one watch RPC. The request has `resume_revision` and `store_id`; the response has
    `revision`, `snapshot`, `stale` and `store_id`, which are set here.

    `respond(update, view)` makes the rest: a response with what `update` changes for watchers with the
    filter `view`, empty if it changes nothing for them. It is called once for each update and view, for all
    watchers together. With `reads_mirror` it is called while the mirror is exactly at the update's revision,
    and there is one view only; otherwise it may use the update alone."""

    def __init__(
        self,
        mirror: Mirror,
        prefix: str,
        respond: Callable[[Update, str], Any],
        *,
        reads_mirror: bool = False,
    ) -> None:
        self._mirror = mirror
        self._prefix = prefix
        self._respond = respond
        self._writing: dict[asyncio.Task[Any], float] = {}
        self._stalled: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        if reads_mirror:
            mirror.prepare(prefix, lambda update: self._encoded(update, ""))

    async def serve(self, request: Any, context: Context, view: str = "") -> AsyncIterator[Any]:
        """A streaming handler. Raises SlowWatcher and what `Mirror.follow` raises."""
        if request.resume_revision < 0:
            raise InvalidInput("resume_revision", "is a revision of an earlier answer, or 0")
        resume = Resume(request.resume_revision, request.store_id) if request.store_id else None
        task: Any = asyncio.current_task()
        try:
            async with aclosing(self._mirror.follow(self._prefix, resume)) as updates:
                async for update in updates:
                    if message := self._encoded(update, view):
                        # Not yielded: only a write of our own can be given up when nobody takes it.
                        self._writing[task] = time.monotonic()
                        self._guard()
                        await context.write(message)
                        del self._writing[task]
        except asyncio.CancelledError:
            if task not in self._stalled:
                raise
            task.uncancel()
            raise SlowWatcher(f"took nothing for {STALL_S:.0f} s; watch again") from None
        finally:
            self._writing.pop(task, None)
            self._stalled.discard(task)
        return
        yield  # a handler that writes to its context by itself still has to be a generator

    def _guard(self) -> None:
        """Look for stalled writes as long as there are writes: one timer for all, not one for each."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GUARD_S, self._cut_stalled)

    def _cut_stalled(self) -> None:
        self._timer = None
        limit = time.monotonic() - STALL_S
        for task in [task for task, since in self._writing.items() if since < limit]:
            del self._writing[task]
            self._stalled.add(task)
            task.cancel()
        if self._writing:
            self._guard()

    def _encoded(self, update: Update, view: str) -> bytes:
        """Empty if there is nothing to tell."""
        encoded = update.encoded.get((self, view))
        if encoded is None:
            response = self._respond(update, view)
            if update.expected or response.ByteSize():
                response.revision = update.revision
                response.snapshot = update.snapshot
                response.stale = update.stale
                response.store_id = update.store_id
            encoded = update.encoded[self, view] = response.SerializeToString()
        return encoded
