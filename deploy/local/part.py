"""One part of the suite: how to start it and how to see that it is ready. And one running process of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.guard import remove
from services.core import tls
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tls import Identity

PROBE_S = 0.05
LOG_LIMIT_BYTES = 10 << 20
# Whatever proxy the environment names: this is loopback.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Part:
    """`ready` tells whether the part answers; `needs` names the parts that must be ready before it starts."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    ports: Mapping[int, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    """Parts that it talks to once they are there: it starts without them, and ends before them."""
    ready_timeout_s: float = 60.0
    stop_timeout_s: float = 8.0
    prepare: Callable[[], None] | None = None
    """Called before every start."""
    drain: Callable[[], Awaitable[None]] | None = None
    """Called before it is asked to end, so that what is in progress comes to its end."""
    leftovers: str = ""
    """Absolute pattern of files that a killed process of the part leaves behind; they are removed."""


class Running:
    """A process of a part, leader of its own process group; its output goes to the part's log."""

    def __init__(self, part: Part, process: asyncio.subprocess.Process) -> None:
        self.part = part
        self._process = process

    @classmethod
    async def start(cls, part: Part, logs: Path) -> Running:
        if part.prepare is not None:
            part.prepare()
        if part.leftovers:
            remove(part.leftovers)
        with _open_log(logs / f"{part.name}.log") as log:
            process = await asyncio.create_subprocess_exec(
                *part.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **part.env},
                start_new_session=True,
            )
        return cls(part, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def ended(self) -> int:
        """Wait for the end; what is left of the process group is killed then."""
        code = await self._process.wait()
        self._kill_group()
        self._clean_up()
        return code

    async def until_ready(self) -> None:
        """Raises ChildProcessError if it ends before, TimeoutError if it takes too long."""
        async with asyncio.timeout(self.part.ready_timeout_s):
            while not await self.part.ready():
                if self.returncode is not None:
                    raise ChildProcessError(f"{self.part.name} ended with code {self.returncode}")
                await asyncio.sleep(PROBE_S)

    async def stop(self) -> None:
        """Ask it to end; after stop_timeout_s, or if stop is cancelled, make it end."""
        try:
            if self.part.drain is not None and self.returncode is None:
                await self.part.drain()
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(self.part.stop_timeout_s):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            self._kill_group()
        await self._process.wait()
        self._clean_up()

    def _clean_up(self) -> None:
        if self.part.leftovers:
            remove(self.part.leftovers)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _open_log(path: Path) -> BinaryIO:
    """To be appended to; one that grew too large is set aside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def http_ready(url: str, identity: Identity | None = None) -> Callable[[], Awaitable[bool]]:
    """Ready when `url` answers 200, asked by a part with this identity."""
    opener = _DIRECT if identity is None else _secured(identity)

    def get() -> bool:
        try:
            with opener.open(url, timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return lambda: asyncio.to_thread(get)


def _secured(identity: Identity) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context(cafile=str(identity.ca))
    context.load_cert_chain(identity.certificate, identity.key)
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )


def grpc_ready(
    address: str, service: str = "", identity: Identity | None = None, ca: Path | None = None
) -> Callable[[], Awaitable[bool]]:
    """Ready when the health service at `address` says SERVING, asked by a part with this identity, or by a
    client who trusts `ca`."""

    def connected() -> grpc.aio.Channel:
        if ca is None:
            return tls.channel(address, CHANNEL_OPTIONS, identity)
        trust = grpc.ssl_channel_credentials(ca.read_bytes())
        return grpc.aio.secure_channel(address, trust, options=CHANNEL_OPTIONS)

    async def check() -> bool:
        async with connected() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return check
