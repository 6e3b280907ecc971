"""A connection of uvicorn's whose client has to say what it wants in time: uvicorn itself waits for ever for
the headers of a request, and for its body."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


@dataclass(frozen=True, slots=True)
class Patience:
    """In seconds, as at the gateway (services/gateway/edge.py). `headers`: until the headers of a request are
    there, from when the connection was made or the first byte came. `body`: how long its body may then take
    altogether."""

    headers: float = 10.0
    body: float = 120.0


AS_AT_THE_GATEWAY = Patience()


class Connection(HttpToolsProtocol):
    """Hangs up on who keeps it waiting. Nothing bounds an answer: it may take as long as it does."""

    patience = AS_AT_THE_GATEWAY
    _waiting: asyncio.TimerHandle | None = None
    _begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(self.patience.headers)

    def data_received(self, data: bytes) -> None:
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._wait(self.patience.headers)
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        self._begun, before = False, self.cycle
        super().on_headers_complete()
        self._wait_no_more()
        if before is None or before.response_complete:
            self._wait(self.patience.body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._wait_no_more()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # What of the next request has come behind the one that is answered now, has waited for it.
        if self._begun:
            self._wait(self.patience.headers)
        elif self._waiting is None and self.cycle.more_body and not self.cycle.response_complete:
            self._wait(self.patience.body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        self._wait_no_more()
        self._waiting = self.loop.call_later(seconds, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def connections(patience: Patience) -> type[Connection]:
    """Those that wait so long."""
    return type("Connection", (Connection,), {"patience": patience})
