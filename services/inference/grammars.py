"""Whether the engine can follow a grammar, found out where it harms nobody (grammar_process.py).

A grammar that the engine cannot compile breaks its pipeline, and with it every stream; one that takes minutes
to compile stops them all. So each is tried first by a tiny model in another process, with a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import OrderedDict
from pathlib import Path

from services.core.errors import BackendUnavailable, InvalidInput, QueueFull
from services.inference.backends.engine import Grammar

TRY_S = 2.0  # the engine compiles it once more, and all streams wait for that
START_S = 60.0
MAX_KNOWN = 1024
MAX_WAITING = 64


class Grammars:
    """The process of one model, started with the first grammar. MAX_KNOWN verdicts are remembered."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._argv = [sys.executable, "-m", "services.inference.grammar_process", str(folder), str(model)]
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: OrderedDict[Grammar, str | None] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Raises InvalidInput for what the engine cannot follow, QueueFull, BackendUnavailable."""
        if grammar not in self._known:
            if self._waiting >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} new grammars wait to be compiled already")
            self._waiting += 1
            try:
                async with self._turn:
                    if grammar not in self._known:
                        self._known[grammar] = await self._tried(grammar)
            finally:
                self._waiting -= 1
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        error = self._known.get(grammar)
        if error is not None:
            raise InvalidInput(f"response_format.{grammar.kind}", error)
        self._known.move_to_end(grammar)

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _tried(self, grammar: Grammar) -> str | None:
        """The compiler's objection. A process that does not answer is ended, with the grammar to blame."""
        process = await self._started()
        question = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode()
        answered = False
        try:
            async with asyncio.timeout(TRY_S):
                found = await _asked(process, question)
            answered = True
        except TimeoutError:
            return f"takes more than {TRY_S:.0f} s to compile; make it simpler"
        except (OSError, EOFError):
            return "takes more memory to compile than it may have"
        finally:
            if not answered:
                await self.close()
        error = found["error"]
        return None if error is None else str(error)

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
