"""A replica as a process, for tests that pause or end it: python -m tests.replica REGISTRIES ID PORT TTL"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from services.core.discovery import Replica
from services.core.lifecycle import run
from services.core.registration import Registration
from services.core.registry import Registry
from services.core.tasks import background


@asynccontextmanager
async def running(registries: str, name: str, port: str, ttl_s: str) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        registry = Registry(registries)
        stack.push_async_callback(registry.close)
        replica = Replica(name, "inference", {"grpc": f"127.0.0.1:{port}"})
        registration = Registration(registry, replica, int(ttl_s))
        stack.push_async_callback(registration.withdraw)
        await stack.enter_async_context(background(registration.run()))
        yield


run("replica", "INFO", running(*sys.argv[1:]))
