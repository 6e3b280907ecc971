"""uvicorn as part of a service: started and stopped by it, and without a hand on the process's signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from services.core import tls
from services.core.sockets import bound
from services.core.tls import Identity
from services.inference.rest.connection import AS_AT_THE_GATEWAY, Patience, connections

log = logging.getLogger(__name__)

# Longer than the gateway keeps an idle connection (clusters.py), so that it is not the server who ends one.
IDLE_S = 75


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the process's (lifecycle.py)."""
        yield


@asynccontextmanager
async def serving_http(
    app: ASGIApp,
    listen: str,
    grace_s: float,
    identity: Identity | None = None,
    patience: Patience = AS_AT_THE_GATEWAY,
) -> AsyncIterator[str]:
    """Serve `app` on `listen` until the end of the block; what is in progress then may go on for `grace_s`.
    With an identity only other parts are answered. `patience` is what clients have to say their requests in.
    Yields the address. Raises OSError if it is taken."""
    sock = bound(listen)
    config = uvicorn.Config(
        app,
        http=connections(patience),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        date_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        loop="none",
    )
    context = None if identity is None else tls.server_context(identity)
    if context is not None:
        config.load()
        config.ssl = context
    server = _Server(config)
    running = asyncio.create_task(server.serve([sock]), name="rest")
    renewing = asyncio.create_task(tls.renewing(context, identity), name="certificate")
    host, port = sock.getsockname()[:2]
    try:
        while not server.started:
            if running.done():
                await running
                raise OSError(f"the REST server on {listen} ended while starting")
            await asyncio.sleep(0.01)
        yield f"{host}:{port}"
    finally:
        renewing.cancel()
        server.should_exit = True
        await running
