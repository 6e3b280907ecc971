"""Starts the parts in order, keeps them running, stops them in waves; leaves nothing behind.

Each part is ready only when it answers. A part that dies is started again, at once the first time and with
growing waits when it keeps dying. When the supervisor itself is killed, guard.py ends the parts.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local import guard
from deploy.local.layout import Layout
from deploy.local.part import Part, Running
from deploy.local.ports import taken

STABLE_S = 10.0
MAX_WAIT_S = 10.0


class CannotStart(Exception):
    """The suite cannot run here and now; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something a user wants to see. `what` is "ready", "died", "failed" or "stopped"."""

    part: str
    what: str
    seconds: float = 0.0
    detail: str = ""


class Supervisor:
    """Runs the parts of one layout; `tell` hears of everything that happens."""

    def __init__(self, layout: Layout, parts: Sequence[Part], tell: Callable[[Event], None]) -> None:
        self._layout = layout
        self._parts = parts
        self._tell = tell
        self._running: dict[str, Running] = {}
        self._ready = {part.name: asyncio.Event() for part in parts}
        self._restarts = {part.name: 0 for part in parts}
        self._log_starts: dict[str, int] = {}
        self._stopping = False
        self._guard: subprocess.Popen[str] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All parts ready inside the block, all ended behind it. Raises CannotStart."""
        async with AsyncExitStack() as stack:
            stack.enter_context(_Lock(self._layout.state))
            self._check_ports()
            self._start_guard()
            stack.callback(self._end_guard)
            stack.callback(self._layout.suite_file.unlink, missing_ok=True)
            stack.push_async_callback(self._stop)
            keepers = [asyncio.create_task(self._keep(part), name=part.name) for part in self._parts]
            stack.push_async_callback(_cancel, keepers)
            await self._all_ready(keepers)
            yield

    def _check_ports(self) -> None:
        ports = {port: use for part in self._parts for port, use in part.ports.items()}
        if problems := taken(ports):
            raise CannotStart(
                "\n".join(problems) + "\nend what holds them, or take others: lingqu up --port-offset 100 "
                "--state .lingqu-100"
            )

    async def _all_ready(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        waits = asyncio.gather(*(event.wait() for event in self._ready.values()))
        try:
            everything: set[asyncio.Future[Any]] = {waits, *keepers}
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                if keeper.done():
                    keeper.result()
        finally:
            if not waits.done():
                waits.cancel()
                await asyncio.gather(waits, return_exceptions=True)

    async def _keep(self, part: Part) -> None:
        """Start the part when its needs are ready, and again whenever it ends. Raises CannotStart if it does
        not get ready the first time."""
        for need in part.needs:
            await self._ready[need].wait()
        wait_s = 0.0
        while True:
            begun = time.monotonic()
            try:
                await self._start(part, begun)
                code = await self._running[part.name].ended()
            except OSError as err:  # it timed out, ended early, or could not be started at all
                if not self._ready[part.name].is_set():
                    raise CannotStart(self._why(part, err)) from err
                if (running := self._running.get(part.name)) is not None:
                    await running.stop()
                code = 1
            finally:
                self._forget(part)
            if self._stopping:
                return
            lived = time.monotonic() - begun
            self._tell(Event(part.name, "died", lived, _cause(code)))
            self._restarts[part.name] += 1
            wait_s = 0.0 if lived > STABLE_S else min(MAX_WAIT_S, wait_s * 2 or 0.25)
            await asyncio.sleep(wait_s)

    async def _start(self, part: Part, begun: float) -> None:
        log = self._layout.logs / f"{part.name}.log"
        self._log_starts[part.name] = log.stat().st_size if log.exists() else 0
        running = await Running.start(part, self._layout.logs)
        self._running[part.name] = running
        self._to_guard(f"+{running.pid}")
        self._write_suite_file()
        await running.until_ready()
        self._tell(Event(part.name, "ready", time.monotonic() - begun))
        self._ready[part.name].set()

    def _forget(self, part: Part) -> None:
        if (running := self._running.get(part.name)) is not None and running.returncode is not None:
            self._to_guard(f"-{running.pid}")
            del self._running[part.name]

    async def _stop(self) -> None:
        """What nobody needs first, then what only that needed, and so on; what is left at once."""
        self._stopping = True
        for wave in waves(self._parts):
            await asyncio.gather(*(self._stop_part(part) for part in wave))

    async def _stop_part(self, part: Part) -> None:
        if (running := self._running.pop(part.name, None)) is not None:
            begun = time.monotonic()
            await running.stop()
            self._to_guard(f"-{running.pid}")
            self._tell(Event(part.name, "stopped", time.monotonic() - begun))

    def _why(self, part: Part, err: BaseException) -> str:
        log = self._layout.logs / f"{part.name}.log"
        text = log.read_bytes()[self._log_starts.get(part.name, 0) :] if log.exists() else b""
        tail = "\n".join(text.decode(errors="replace").splitlines()[-15:])
        reason = str(err) or f"{part.name} did not get ready within {part.ready_timeout_s:.0f} s"
        return f"{reason}; the end of {log}:\n{tail}"

    def _write_suite_file(self) -> None:
        body = {
            "pid": os.getpid(),
            "offset": self._layout.offset,
            "tls": self._layout.secured,
            "parts": {
                part.name: {
                    "pid": self._running[part.name].pid if part.name in self._running else None,
                    "ports": list(part.ports),
                    "restarts": self._restarts[part.name],
                }
                for part in self._parts
            },
        }
        partial = self._layout.suite_file.with_suffix(".tmp")
        partial.write_text(json.dumps(body, indent=1))
        partial.replace(self._layout.suite_file)

    def _start_guard(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__],
            stdin=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        for part in self._parts:
            if part.leftovers:
                self._to_guard(f"~{part.leftovers}")
        for running in self._running.values():
            self._to_guard(f"+{running.pid}")

    def _to_guard(self, line: str) -> None:
        assert self._guard is not None  # noqa: S101 - running() starts it first
        assert self._guard.stdin is not None  # noqa: S101
        try:
            self._guard.stdin.write(line + "\n")
        except BrokenPipeError:
            self._start_guard()

    def _end_guard(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()


def waves(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that may end together, in the order in which they end: each before all that it needs or asks, and
    as late as that."""
    depths: dict[str, int] = {}
    for part in parts:  # each comes behind what it needs
        used = (depths[name] for name in (*part.needs, *part.asks) if name in depths)
        depths[part.name] = 1 + max(used, default=-1)
    deepest = max(depths.values(), default=-1)
    return [[p for p in parts if depths[p.name] == depth] for depth in range(deepest, -1, -1)]


class _Lock:
    """One suite for one state folder. The kernel drops it when the process ends, however it ends."""

    def __init__(self, state: Path) -> None:
        self._path = state / "lock"

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self._file.seek(0)
            pid = self._file.read().strip() or "unknown"
            self._file.close()
            raise CannotStart(
                f"a suite is running in {self._path.parent} already (pid {pid}); `lingqu status` shows it"
            ) from err
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
