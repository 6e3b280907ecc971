"""From the first log line to a clean stop: the frame around every service's `running()`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.core import http2, tls
from services.core.tls import Identity

# A message may be as large as Triton's own limit allows; what is too large for a field is refused by name.
MAX_MESSAGE_BYTES = 64 << 20
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared one
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default gRPC cancels calls at random from 1000 on that it could not hand over yet: whom we refuse is
    # to be told so, by InFlightLimit or by a queue.
    ("grpc.server.max_pending_requests", 65_536),
    ("grpc.server.max_pending_requests_hard_limit", 65_536),
]
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A part that was restarted is found again within a second, however long it was away.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 20_000),
    # Not keepalive_timeout_ms: with grpcio 1.81 and later that alone did not end a call in 30 s.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # the parts of a suite reach each other directly
]


def run(name: str, log_level: str, running: AbstractAsyncContextManager[object]) -> None:
    """Run a service until SIGINT or SIGTERM; a second signal ends the process at once."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def body() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(130)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        async with running:
            gc.collect()
            gc.freeze()  # what lives from now on to the end is not looked at again and again
            logging.getLogger(name).info("ready")
            await stop.wait()
            logging.getLogger(name).info("stopping")

    uvloop.run(body())


@asynccontextmanager
async def serving(
    server: grpc.aio.Server,
    listen: str,
    services: Iterable[str],
    grace_s: float,
    identity: Identity | None = None,
) -> AsyncIterator[health.aio.HealthServicer]:
    """Start `server` on `listen` with reflection and health for `services`; drain and stop it at the end.
    With an identity only other parts are answered.

    Raises OSError if the address is taken."""
    names = list(services)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        if isinstance(server, http2.Server):
            server.listen(listen, identity)
        else:
            tls.listen(server, listen, identity)
    except RuntimeError as err:
        raise OSError(f"cannot listen on {listen}: {err}") from err
    await server.start()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield checks
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(grace_s)
