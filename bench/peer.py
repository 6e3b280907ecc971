"""A process that measures: a JSON line in, one out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any


class Peer:
    """`python -m …` until `close`."""

    def __init__(self, *argv: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    async def measure(self, asked: dict[str, Any]) -> Any:
        """Raises ChildProcessError if the process ends instead of answering."""
        return await asyncio.to_thread(self._measure, asked)

    def _measure(self, asked: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"the measuring process ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
