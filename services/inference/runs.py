"""A computation that several callers follow, each at its own pace, until the last one leaves.

What has come is kept until then: who joins late gets that first, and who reads slowly slows nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager

from services.core.errors import BackendUnavailable, DeadlinePassed
from services.inference.answers import merged
from services.inference.callers import Caller
from services.inference.figures import Outcome, outcome_of
from services.inference.text import Delta


class Run:
    """Begins at once. `on_end` is called when nobody can join any more, because the computation has ended or
    its last follower has left, maybe once for each; `on_settled` once, when both have happened.

    `error` is why it ended, None for a good end; `delivered`: somebody was given all of it; `left_as`: how it
    ended for the last who left."""

    def __init__(
        self,
        source: AsyncGenerator[Delta, None],
        on_end: Callable[[Run], None],
        on_settled: Callable[[Run], None],
    ) -> None:
        self.deltas: list[Delta] = []
        self.error: BaseException | None = None
        self.ended = False
        self.delivered = False
        self.left_as = Outcome.OK
        self._followers = 0
        self._sleepers: list[asyncio.Future[None]] = []
        self._on_end = on_end
        self._on_settled = on_settled
        self._task = asyncio.create_task(self._compute(source), name="run")
        self._task.add_done_callback(self._done)  # no `finally`: a task cancelled early never begins

    async def close(self) -> None:
        """End it, whoever follows."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @contextmanager
    def followed(self, caller: Caller) -> Iterator[None]:
        """For the block the caller counts as one who wants the result."""
        self._followers += 1
        try:
            yield
        except BaseException as err:
            self.left_as = outcome_of(err, caller)
            raise
        finally:
            self._followers -= 1
            if not self._followers:
                if self.ended:
                    self._on_settled(self)
                else:
                    self._task.cancel()
                    self._on_end(self)

    async def follow(self, caller: Caller, joined: bool) -> AsyncGenerator[Delta, None]:
        """All deltas from the first; what has gathered comes as one. Only within `followed`.

        Raises what ended the run, or DeadlinePassed at the caller's own deadline."""
        passed = False

        def ring() -> None:
            nonlocal passed
            passed = True
            self._wake()

        left = caller.remaining
        alarm = None if left is None else asyncio.get_running_loop().call_later(left, ring)
        place = 0
        try:
            while not passed:
                if place < len(self.deltas):
                    pieces = merged(self.deltas[place:], joined)
                    place = len(self.deltas)
                    self.delivered |= pieces[-1].prompt_tokens > 0  # the very last has the counts
                    for piece in pieces:
                        yield piece
                elif self.ended:
                    if self.error is not None:
                        raise self.error
                    self.delivered = True
                    return
                else:
                    await self._news()
            raise DeadlinePassed("the deadline passed before the answer was complete")
        finally:
            if alarm is not None:
                alarm.cancel()

    async def _compute(self, source: AsyncGenerator[Delta, None]) -> None:
        async with aclosing(source) as deltas:
            async for delta in deltas:
                self.deltas.append(delta)
                self._wake()

    def _done(self, task: asyncio.Task[None]) -> None:
        error: BaseException | None
        error = BackendUnavailable("the service is stopping") if task.cancelled() else task.exception()
        self.error, self.ended = error, True
        self._wake()
        self._on_end(self)
        if not self._followers:
            self._on_settled(self)

    async def _news(self) -> None:
        sleeper = asyncio.get_running_loop().create_future()
        self._sleepers.append(sleeper)
        await sleeper

    def _wake(self) -> None:
        sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            if not sleeper.done():
                sleeper.set_result(None)
