"""Messages that wait for room in a client's windows. Pure: no I/O."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Waiting:
    rest: memoryview
    gone: asyncio.Future[None]


class Outbox:
    """Streams take turns, a frame each, so that none takes all of the connection's window. One whose own
    window is used up is left out until there is more of it, so that the work is that of what is sent.

    `room` says how many bytes of a stream may be sent in one frame now, and `send` does it. `blocked`: no
    stream may send anything."""

    def __init__(
        self, room: Callable[[int], int], send: Callable[[int, bytes], None], blocked: Callable[[], bool]
    ) -> None:
        self._room = room
        self._send = send
        self._blocked = blocked
        self._turns: OrderedDict[int, _Waiting] = OrderedDict()
        self._stalled: dict[int, _Waiting] = {}

    def __contains__(self, stream: int) -> bool:
        return stream in self._turns or stream in self._stalled

    async def sent(self, stream: int, data: bytes) -> None:
        """Return when all of it is sent. One message of a stream at a time."""
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[stream] = _Waiting(memoryview(data), gone)
        self.pump()
        try:
            await gone
        finally:
            self.drop(stream)

    def pump(self) -> None:
        """Send what there is room for."""
        while self._turns and not self._blocked():
            stream, waiting = self._turns.popitem(last=False)
            room = self._room(stream)
            if not room:
                self._stalled[stream] = waiting
                continue
            self._send(stream, bytes(waiting.rest[:room]))
            waiting.rest = waiting.rest[room:]
            if waiting.rest:
                self._turns[stream] = waiting
            elif not waiting.gone.done():
                waiting.gone.set_result(None)

    def opened(self, stream: int | None = None) -> None:
        """There may be room again on that stream; None: on all."""
        if stream is None:
            self._turns.update(self._stalled)
            self._stalled.clear()
        elif (waiting := self._stalled.pop(stream, None)) is not None:
            self._turns[stream] = waiting
        self.pump()

    def drop(self, stream: int) -> None:
        """Nobody waits for it any more."""
        waiting = self._turns.pop(stream, None) or self._stalled.pop(stream, None)
        if waiting is not None:
            waiting.gone.cancel()
