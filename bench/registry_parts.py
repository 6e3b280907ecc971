"""A real etcd and real registries as child processes, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from deploy.local import layout as at
from deploy.local.layout import HOST, Layout
from deploy.local.part import Part, Running, grpc_ready
from deploy.local.parts import etcd


class Child:
    """A part that may be ended and started again in every way there is."""

    def __init__(self, part: Part, logs: Path, address: str) -> None:
        self.part = part
        self.address = address
        self._logs = logs
        self._running: Running | None = None

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    async def start(self) -> None:
        self._running = await Running.start(self.part, self._logs)
        await self._running.until_ready()

    async def stop(self) -> None:
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                self.go_on()
            await self._running.stop()
            self._running = None

    async def kill(self) -> None:
        assert self._running is not None
        os.kill(self.pid, signal.SIGKILL)
        await self._running.ended()
        self._running = None

    def freeze(self) -> None:
        """It goes on to have its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """Processor time used so far, which work of others does not add to."""
        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)

    def rss_mib(self) -> float:
        return float(psutil.Process(self.pid).memory_info().rss) / (1 << 20)


def etcd_child(layout: Layout, *arguments: str) -> Child:
    part = etcd(layout)
    return Child(replace(part, argv=part.argv + arguments), layout.logs, layout.address(at.ETCD))


def registry_child(
    layout: Layout,
    port: int,
    etcd_endpoints: str,
    *,
    prefix: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> Child:
    """`prefix` is a command such as taskset that runs the registry."""
    address = f"{HOST}:{port}"
    part = Part(
        name=f"registry-{port}",
        argv=(*prefix, sys.executable, "-m", "services.registry"),
        env={"LINGQU_REGISTRY_LISTEN": address, "LINGQU_ETCD": etcd_endpoints, **(env or {})},
        ready=grpc_ready(address),
    )
    return Child(part, layout.logs, address)
