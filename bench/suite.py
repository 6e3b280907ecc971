"""A suite of its own for a benchmark or a test: other ports, a folder of its own, gone at the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.publishing import Artifact, Publisher
from pipeline.tensor import package_tensor
from services.core import tls
from services.core.lifecycle import CHANNEL_OPTIONS

ECHO = Path(__file__).parent / "models" / "echo"
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Suite:
    """A running suite. `process` is its `lingqu up`."""

    layout: Layout
    process: asyncio.subprocess.Process

    @property
    def public(self) -> str:
        return self.layout.address(at.PUBLIC)

    @property
    def triton(self) -> str:
        return self.layout.address(at.TRITON_GRPC)

    @property
    def key(self) -> str:
        return self.layout.dev_key.read_text().strip()

    def part(self, words: str) -> psutil.Process:
        """The first of the suite's processes with `words` in its command line. Raises LookupError."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if words in " ".join(process.cmdline()):
                return process
        raise LookupError(f"no process of the suite is called {words}")

    async def publish(self, name: str, folder: Path, *, traffic: bool = True) -> int:
        """Publish an artifact, wait until it is ready, and return the version."""
        identity = self.layout.identity("cli")
        async with (
            tls.channel(self.layout.address(at.REGISTRY), CHANNEL_OPTIONS, identity) as registry,
            tls.channel(self.layout.address(at.GATEWAY), CHANNEL_OPTIONS, identity) as gateway,
        ):
            return await Publisher(registry, gateway, self.key).publish(
                name, Artifact.at(folder), traffic=traffic, timeout_s=60, tell=lambda text: None
            )

    async def publish_echo(self, name: str = "echo") -> None:
        await self.publish(name, package_tensor(ECHO, self.layout.state / "made").folder)


@asynccontextmanager
async def running(offset: int, *arguments: str, state: Path | None = None) -> AsyncIterator[Suite]:
    """`lingqu up --port-offset OFFSET …` until the end of the block. Raises ChildProcessError with the
    suite's own words if it does not come up."""
    home = state or Path(tempfile.mkdtemp(prefix="lingqu-"))
    lingqu = Path(sys.executable).parent / "lingqu"
    process = await asyncio.create_subprocess_exec(
        str(lingqu), "--state", str(home), "up", "--port-offset", str(offset), *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said: list[str] = []
    drain: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := (await process.stdout.readline()).decode():
                said.append(line)
                if line.startswith("Ctrl-C stops"):
                    break
            else:
                raise ChildProcessError("the suite did not come up:\n" + "".join(said))
        drain = asyncio.create_task(_drain(process.stdout))
        yield Suite(Layout(home.resolve(), offset, "--tls" in arguments), process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), 30)
        except TimeoutError:
            os.kill(process.pid, signal.SIGKILL)  # its guard ends the parts
            await process.wait()
        if drain is not None:
            await drain
        if state is None:
            shutil.rmtree(home, ignore_errors=True)


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass
