"""What engines of text models say of themselves, asked every few seconds, as figures."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import grpc

from services.core.discovery import VersionKey
from services.inference.backends import wire
from services.inference.figures import (
    ENGINE_CACHE,
    ENGINE_SEQUENCES,
    ENGINE_STEPS,
    ENGINE_TOKENS,
    ENGINE_WASTED,
    Figures,
    gauge_labels,
)
from services.inference.served import Served
from services.inference.text import TextModel
from services.inference.triton import Triton, command_request

log = logging.getLogger(__name__)

EVERY_S = 5.0
TIMEOUT_S = 3.0
_COUNTED = {"steps": ENGINE_STEPS, "tokens": ENGINE_TOKENS, "wasted": ENGINE_WASTED}

Said = Mapping[str, float | None]
"""jobs.Counts, by the names of its fields."""


class Engines:
    """An engine that does not answer in time is left out, and asked again."""

    def __init__(
        self,
        triton: Triton,
        secret: str,
        served: Callable[[], Mapping[VersionKey, Served]],
        figures: Figures,
        every_s: float = EVERY_S,
    ) -> None:
        self._triton, self._secret, self._served = triton, secret, served
        self._figures, self._every_s = figures, every_s
        self._said: dict[VersionKey, Said] = {}
        figures.gauge(ENGINE_SEQUENCES, lambda: self._now("sequences"))
        figures.gauge(ENGINE_CACHE, lambda: self._now("cache"))

    async def run(self) -> None:
        """For ever."""
        while True:
            keys = [key for key, model in self._served().items() if isinstance(model, TextModel)]
            found = await asyncio.gather(*map(self._ask, keys))
            before, self._said = (
                self._said,
                {key: said for key, said in zip(keys, found, strict=True) if said},
            )
            for key, said in self._said.items():
                self._count(key, before.get(key, {}), said)
            await asyncio.sleep(self._every_s)

    async def _ask(self, key: VersionKey) -> Said:
        command = wire.dump(wire.Command("stats", "", self._secret))

        async def requests() -> AsyncIterator[Any]:
            yield command_request(key, "stats", command)

        call = self._triton.stream(requests())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for answer in call:
                    said: Said = json.loads(answer.infer_response.raw_output_contents[0][wire.BYTES_PREFIX :])
                    return said
        except (TimeoutError, grpc.aio.AioRpcError, ValueError, IndexError) as err:
            log.debug("the engine of %s does not tell: %r", key, err)
        finally:
            call.cancel()
        return {}

    def _count(self, key: VersionKey, before: Said, now: Said) -> None:
        """What came since; an engine that counts from the beginning is another one."""
        anew = any((now.get(name) or 0) < (before.get(name) or 0) for name in _COUNTED)
        for name, figure in _COUNTED.items():
            added = (now.get(name) or 0) - (0 if anew else before.get(name) or 0)
            if added:
                self._figures.add(figure, key, added)

    def _now(self, name: str) -> Iterator[tuple[Mapping[str, str], float]]:
        for key, said in self._said.items():
            if (value := said.get(name)) is not None:
                yield gauge_labels(key), value
