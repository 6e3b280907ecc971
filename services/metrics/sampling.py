"""What the collector measures by itself, every few seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from http.client import HTTPException

import psutil

from services.core.certificates import DAYS_LEFT, DaysLeft, of
from services.core.tls import Identity
from services.metrics import scrape
from services.metrics.host import Gpus, Host
from services.metrics.intake import Intake
from services.metrics.readings import Reading

log = logging.getLogger(__name__)

ROTATE_S = 12 * 3600


class Certificates:
    """Of this service, as other parts tell of theirs."""

    def __init__(self, identity: Identity, instance: str) -> None:
        self._days_left, self._instance = DaysLeft(of(identity)), instance

    def readings(self) -> list[Reading]:
        now, own = time.time_ns(), {"service": "lingqu-metrics", "instance": self._instance}
        return [
            Reading(DAYS_LEFT, {**own, "certificate": name}, {"value": days}, now)
            for name, days in self._days_left.read().items()
        ]


async def measure(
    intake: Intake,
    host: Host,
    gpus: Gpus,
    tritons: Sequence[str],
    every_s: float,
    certificates: Certificates | None = None,
) -> None:
    """For ever. A source that fails is left out and asked again."""
    loop = asyncio.get_running_loop()
    rotate_at = loop.time() + ROTATE_S
    watched = [scrape.Watched(address) for address in tritons]
    try:
        while True:
            found = await asyncio.gather(
                asyncio.to_thread(_machine, host, gpus), *(_triton(triton) for triton in watched)
            )
            for some in found:
                intake.take(some)
            if certificates is not None:
                intake.take(await asyncio.to_thread(certificates.readings))
            intake.report()
            if loop.time() >= rotate_at:
                rotate_at = loop.time() + ROTATE_S
                intake.rotate()
            await asyncio.sleep(every_s)
    finally:
        gpus.close()


def _machine(host: Host, gpus: Gpus) -> list[Reading]:
    found: list[Reading] = []
    try:
        found += host.readings()
        found += gpus.readings()
    except (OSError, psutil.Error) as err:
        log.warning("figures of this machine: %s", err)
    return found


async def _triton(triton: scrape.Watched) -> list[Reading]:
    try:
        page = await asyncio.to_thread(scrape.fetch, triton.address)
    except (OSError, HTTPException) as err:
        log.debug("Triton's counters at %s: %s", triton.address, err)
        return []
    return triton.readings(page)
