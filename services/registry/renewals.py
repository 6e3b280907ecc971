"""Keeping leases alive: the keep-alive streams of all instances share one stream to etcd."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from services.core.errors import LingquError
from services.registry.etcd import Etcd
from services.registry.members import CALL_TIMEOUT_S


class Renewals:
    """`renew` may be called while `run` does."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._asked: asyncio.Queue[int] = asyncio.Queue()
        self._waiting: defaultdict[int, list[asyncio.Future[int]]] = defaultdict(list)
        self._needed = asyncio.Event()

    async def renew(self, lease: int) -> int:
        """Seconds left now; 0 if the lease has expired. Raises BackendUnavailable."""
        if self._etcd.members.away:
            raise self._etcd.members.unavailable("etcd is out of reach; the lease waits for it, too")
        renewed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if lease not in self._waiting:
            self._asked.put_nowait(lease)
        self._waiting[lease].append(renewed)
        self._needed.set()
        return await renewed

    async def run(self) -> None:
        """Renew what is asked for, for ever, on a new stream whenever one was lost."""
        while True:
            await self._needed.wait()
            try:
                async with aclosing(self._etcd.renew(self._all_asked())) as answers:
                    await self._take(answers)
            except (LingquError, TimeoutError) as err:
                self._fail(str(err) or f"etcd renewed no lease for {CALL_TIMEOUT_S:.0f} s")

    async def _take(self, answers: AsyncGenerator[tuple[int, int], None]) -> None:
        clock = asyncio.get_running_loop().time
        async with asyncio.timeout(CALL_TIMEOUT_S) as silence:
            async for lease, left_s in answers:
                for renewed in self._waiting.pop(lease, ()):
                    if not renewed.done():
                        renewed.set_result(left_s)
                if not self._waiting:
                    self._needed.clear()
                    silence.reschedule(None)
                    await self._needed.wait()
                silence.reschedule(clock() + CALL_TIMEOUT_S)

    def _fail(self, text: str) -> None:
        """Each with a retry delay of its own."""
        for renewed in [future for futures in self._waiting.values() for future in futures]:
            if not renewed.done():
                renewed.set_exception(self._etcd.members.unavailable(text))
        self._waiting.clear()
        self._needed.clear()
        self._asked = asyncio.Queue()

    async def _all_asked(self) -> AsyncIterator[int]:
        asked = self._asked
        while True:
            yield await asked.get()
