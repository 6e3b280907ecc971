"""Notices engines that died or hang: Triton itself says READY of both.

An engine that has work says something every few seconds, if only that it goes on (backends/sinks.py); one
that is silent for longer is taken for hung and ended, because it would never give its memory back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from services.core.discovery import VersionKey
from services.inference.processes import Processes, ended, kill, stopped

log = logging.getLogger(__name__)


ILL_S = 2.0  # a busy machine may fail Triton's look at a process; then something else is heard of it soon


class Pulse:
    """When an engine that has work was last heard of, and since when Triton calls its process ill."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting = 0
        self._heard = clock()
        self._ill_since: float | None = None

    def __enter__(self) -> None:
        if not self._waiting:
            self._heard = self._clock()
        self._waiting += 1

    def __exit__(self, *_: object) -> None:
        self._waiting -= 1

    def heard(self) -> None:
        """The engine answered; that somebody stopped waiting is no sign of life."""
        self._heard = self._clock()
        self._ill_since = None

    def complain(self) -> None:
        """Triton said that the process is not healthy."""
        if self._ill_since is None:
            self._ill_since = self._clock()

    @property
    def ill(self) -> bool:
        """Whether that is some time ago, and nothing better was heard since."""
        return self._ill_since is not None and self._clock() - self._ill_since >= ILL_S

    @property
    def silent_s(self) -> float:
        """How long nothing has been heard; 0 while nobody waits."""
        return self._clock() - self._heard if self._waiting else 0.0


@dataclass(frozen=True, slots=True)
class Broken:
    """An engine to be replaced. `blame`: it is likely the version's own fault, and no busy machine's."""

    why: str
    blame: bool = True


@dataclass(slots=True)
class _Watched:
    silent_s: Callable[[], float]
    ill: Callable[[], bool]
    processes: list[psutil.Process] = field(default_factory=list)


class Watchdog:
    """Of one Triton's engines. `timeout_s`: how long one may be silent."""

    def __init__(self, processes: Processes, timeout_s: float) -> None:
        self._processes = processes
        self._timeout_s = timeout_s
        self._watched: dict[VersionKey, _Watched] = {}
        self._triton: psutil.Process | None = None
        self._unheard_since: float | None = None

    async def watch(
        self, key: VersionKey, silent_s: Callable[[], float], ill: Callable[[], bool] = lambda: False
    ) -> None:
        """From now on. Call it when Triton has loaded the version."""
        found = await asyncio.to_thread(self._processes.of, key)
        self._watched[key] = _Watched(silent_s, ill, found)
        if found:
            self._triton = await asyncio.to_thread(found[0].parent)

    def forget(self, key: VersionKey) -> list[psutil.Process]:
        """Returns its processes."""
        watched = self._watched.pop(key, None)
        return watched.processes if watched is not None else []

    def broken(self) -> dict[VersionKey, Broken]:
        """What died or hangs."""
        found = {}
        for key, watched in self._watched.items():
            silent, processes = watched.silent_s(), watched.processes
            if any(map(ended, processes)):
                found[key] = Broken("its process in Triton ended")
            elif watched.ill():
                found[key] = Broken("Triton calls its process not healthy", any(map(stopped, processes)))
            elif silent > self._timeout_s:
                found[key] = Broken(f"it has not answered for {silent:.0f} s")
        return found

    def triton_ended(self) -> bool:
        """Whether the Triton that the engines belonged to is gone; another may answer in its place already.
        Its models died with it, and are not to blame."""
        return self._triton is not None and ended(self._triton)

    def end(self, key: VersionKey) -> None:
        """Kill what runs the version and forget it."""
        processes = self.forget(key)
        if not processes:
            log.warning("%s: its process is not to be seen from here; it may stay, hung", key)
        kill(processes)

    def heard(self, triton_answers: bool) -> None:
        """End a Triton that has not answered for as long, so that whoever looks after it starts another."""
        if triton_answers:
            self._unheard_since = None
            return
        now = time.monotonic()
        self._unheard_since = self._unheard_since or now
        if now - self._unheard_since > self._timeout_s and self._triton is not None:
            log.error("Triton has not answered for %.0f s; ending it", now - self._unheard_since)
            kill([self._triton])
            self._triton, self._unheard_since = None, None
