"""Turns what Envoys report into breakers that open and close: once a second, beside the watches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from services.gateway.breakers import Breakers, Load, Phase, VersionId
from services.gateway.loads import INTERVAL_S, Loads
from services.gateway.view import View

log = logging.getLogger(__name__)


class Judge:
    """`changed` is set when routes have to be made anew. `hears` is given all that is judged."""

    def __init__(
        self,
        changed: asyncio.Event,
        hears: Callable[[Mapping[VersionId, Load]], None] = lambda loads: None,
    ) -> None:
        self.loads = Loads()
        self.breakers = Breakers()
        self._changed = changed
        self._hears = hears
        self._view = View((), ())

    def applied(self, view: View) -> View:
        """The view with what breakers let through; it is what is judged from now on."""
        self._view = view
        return self.breakers.applied(view)

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            loads = self.loads.take()
            self._hears(loads)
            moved = self.breakers.advance(loads, self._view, time.monotonic())
            for target, breaker in moved:
                why = f": {breaker.reason}" if breaker.phase is Phase.OPEN else ""
                log.warning("breaker of %s v%d %s%s", target.model, target.version, breaker.phase.value, why)
            if moved:
                self._changed.set()
