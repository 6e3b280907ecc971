"""The server: methods by their names, ports, and a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from services.core import tls
from services.core.http2.connection import CLOSE_S, Budget, Connection, Terms
from services.core.sockets import bound
from services.core.tls import Identity

log = logging.getLogger(__name__)

PROTOCOLS = ("h2",)  # of ALPN, without which some clients do not talk
BACKLOG = 1024
HANDSHAKE_S = 10.0
# How long a handler may take to end once it is cancelled.
CANCEL_S = 2.0
# Of requests that are not answered yet, in all connections together.
MAX_HELD_BYTES = 512 << 20


class Server(grpc.aio.Server):
    """`interceptors` are asked once for each method, not for each call: what is around a handler may not
    depend on a call's metadata, which it sees when it runs. A message may have `max_message` bytes."""

    def __init__(
        self, interceptors: Sequence[grpc.aio.ServerInterceptor] = (), *, max_message: int = 4 << 20
    ) -> None:
        self._interceptors = tuple(interceptors)
        self._generic: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, _Method] = {}
        self._terms = Terms(self._method, max_message, Budget(MAX_HELD_BYTES))
        self._listening: list[tuple[Any, ssl.SSLContext | None]] = []
        self._renewing: list[asyncio.Task[None]] = []
        self._servers: list[asyncio.Server] = []
        self._stopped = asyncio.Event()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._generic.extend(generic_rpc_handlers)

    def listen(self, address: str, identity: Identity | None = None) -> int:
        """The port. With an identity only for callers that have one, too. Raises OSError if it is taken or a
        file cannot be read."""
        context = None if identity is None else tls.server_context(identity, PROTOCOLS)
        if context is not None:
            renewing = tls.renewing(context, identity, PROTOCOLS)
            self._renewing.append(asyncio.create_task(renewing, name="certificate"))
        made = bound(address)
        self._listening.append((made, context))
        return int(made.getsockname()[1])

    def add_insecure_port(self, address: str) -> int:
        return self.listen(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        raise TypeError("grpcio's credentials cannot be read: use listen() with an identity")

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for made, context in self._listening:
            self._servers.append(
                await loop.create_server(
                    lambda: Connection(self._terms),
                    sock=made,
                    ssl=context,
                    backlog=BACKLOG,
                    ssl_handshake_timeout=None if context is None else HANDSHAKE_S,
                )
            )

    async def stop(self, grace: float | None) -> None:
        """Begin no more calls; those in progress may go on for `grace` seconds."""
        self._terms.stopping = True
        for server in self._servers:
            server.close()
        connections = list(self._terms.connections)
        for connection in connections:
            connection.drain()
        if grace:
            await _closed(connections, grace)
        connections = list(self._terms.connections)
        for connection in connections:
            connection.refuse()
        calls = [call for connection in connections for call in connection.calls]
        for call in calls:
            call.cut(grpc.StatusCode.UNAVAILABLE, "the service is stopping")
        if tasks := [call.task for call in calls if call.task is not None]:
            _, deaf = await asyncio.wait(tasks, timeout=CANCEL_S)
            if deaf:
                log.warning("%d handlers go on, though they were cancelled", len(deaf))
        for connection in connections:
            connection.close()
        await _closed(connections, 2 * CLOSE_S)
        for task in self._renewing:
            task.cancel()
        self._stopped.set()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        try:
            await asyncio.wait_for(self._stopped.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _method(self, path: str) -> tuple[Any, Callable[[], Awaitable[Any]]] | None:
        if (known := self._methods.get(path)) is None:
            details = _Details(path)
            handler = next((h for g in self._generic if (h := g.service(details)) is not None), None)
            if handler is None:
                return None
            known = self._methods[path] = _Method(handler, details, self._interceptors)
        return known.handler, known.whole


async def _closed(connections: Iterable[Connection], timeout_s: float) -> None:
    """Wait for it, no longer than that."""
    closed = asyncio.gather(*(connection.closed.wait() for connection in connections))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(closed, timeout_s)


class _Details(grpc.HandlerCallDetails):
    invocation_metadata = ()

    def __init__(self, method: str) -> None:
        self.method = method


class _Method:
    """A handler, and the same with all interceptors around it."""

    def __init__(
        self, handler: Any, details: _Details, interceptors: tuple[grpc.aio.ServerInterceptor, ...]
    ) -> None:
        self.handler = handler
        self._details = details
        self._interceptors = interceptors
        self._whole: Any = None

    async def whole(self) -> Any:
        if self._whole is None:
            self._whole = await self._from(0)
        return self._whole

    async def _from(self, number: int) -> Any:
        if number == len(self._interceptors):
            return self.handler

        async def further(_: grpc.HandlerCallDetails) -> Any:
            return await self._from(number + 1)

        return await self._interceptors[number].intercept_service(further, self._details)
