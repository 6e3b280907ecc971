"""uvicorn as part of a service: started and stopped by it, and without a hand on the process's signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from services.core import tls
from services.core.tls import Identity
from services.inference.rest.connection import AS_AT_THE_GATEWAY, Patience, connections

log = logging.getLogger(__name__)

# Longer than the gateway keeps an idle connection (clusters.py), so that it is not the server who ends one.
IDLE_S = 75
# How often files of certificates are looked at.
RENEW_S = 1.0


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
    bound = _bound(listen)
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
    if identity is not None:
        config.load()
        config.ssl = tls.server_context(identity)
    server = _Server(config)
    running = asyncio.create_task(server.serve([bound]), name="rest")
    renewing = asyncio.create_task(_renew(config, identity), name="rest-certificate")
    host, port = bound.getsockname()[:2]
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


async def _renew(config: uvicorn.Config, identity: Identity | None) -> None:
    if identity is None or config.ssl is None:
        return
    seen = identity.written
    while True:
        await asyncio.sleep(RENEW_S)
        try:
            if (written := identity.written) != seen:
                tls.renew(config.ssl, identity)
                seen = written
        except OSError as err:
            log.warning("the certificate in use stays, the new one cannot be read: %s", err)


def _bound(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Not SO_REUSEPORT: a taken port is an error, not a shared one.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, int(port)))
    except OSError as err:
        bound.close()
        raise OSError(f"cannot listen on {listen}: {err}") from err
    return bound
