"""Whether the engine can follow a grammar, found out where it harms nobody (grammar_process.py).

A grammar that the engine cannot compile breaks its pipeline, and with it every stream; one that takes minutes
to compile stops them all. So each is tried first by a tiny model in another process, with a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import BackendUnavailable, InvalidInput, QueueFull
from services.inference.backends.jobs import Grammar

TRY_S = 2.0  # the engine compiles it once more, and all streams wait for that
START_S = 60.0
MAX_KNOWN = 1024
DOUBT_S = 30.0  # after which one that took too long is tried again: the machine may have been busy
MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class _Verdict:
    """`error`: the compiler's objection, None if it has none. Not to be relied on after `until`."""

    error: str | None
    until: float = math.inf


class Grammars:
    """The process of one model, started with the first grammar. MAX_KNOWN verdicts are remembered."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._argv = [sys.executable, "-m", "services.inference.grammar_process", str(folder), str(model)]
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: OrderedDict[Grammar, _Verdict] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Raises InvalidInput for what the engine cannot follow, QueueFull, BackendUnavailable."""
        if (verdict := self._verdict(grammar)) is None:
            if self._waiting >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} new grammars wait to be compiled already")
            self._waiting += 1
            try:
                async with self._turn:
                    if (verdict := self._verdict(grammar)) is None:
                        verdict = self._known[grammar] = await self._tried(grammar)
            finally:
                self._waiting -= 1
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        if verdict.error is not None:
            raise InvalidInput(f"response_format.{grammar.kind}", verdict.error)
        self._known.move_to_end(grammar)

    def _verdict(self, grammar: Grammar) -> _Verdict | None:
        known = self._known.get(grammar)
        return known if known is not None and time.monotonic() < known.until else None

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _tried(self, grammar: Grammar) -> _Verdict:
        """What the compiler says. A process that does not answer is ended, with the grammar to blame."""
        process = await self._started()
        question = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode()
        answered = False
        try:
            async with asyncio.timeout(TRY_S):
                found = await _asked(process, question)
            answered = True
        except TimeoutError:
            error = f"takes more than {TRY_S:.0f} s to compile; make it simpler"
            return _Verdict(error, time.monotonic() + DOUBT_S)
        except (OSError, EOFError):
            return _Verdict("takes more memory to compile than it may have", time.monotonic() + DOUBT_S)
        finally:
            if not answered:
                await self.close()
        said = found["error"]
        return _Verdict(None if said is None else str(said))

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        self._process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20
        )
        try:
            async with asyncio.timeout(START_S):
                await _asked(self._process, b"")
        except (TimeoutError, OSError, EOFError) as err:
            await self.close()
            raise BackendUnavailable("grammars cannot be tried at the moment") from err
        return self._process


async def _asked(process: asyncio.subprocess.Process, question: bytes) -> dict[str, object]:
    """The next line of the process, after sending it `question`, if it has one. Raises OSError, EOFError."""
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    if question:
        process.stdin.write(question + b"\n")
        await process.stdin.drain()
    line = await process.stdout.readline()
    if not line:
        raise EOFError
    answer: dict[str, object] = json.loads(line)
    return answer
