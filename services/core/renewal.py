"""What was made of a certificate's files, and is made anew when they have changed: a channel to another part
among it.

grpcio reads a channel's certificate once. So there is a channel behind the channel: when the files say
something else, calls that begin from then on get a new one. The former is let go; gRPC ends its connection
with its last call, so that streams go on with the certificate that they began with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

log = logging.getLogger(__name__)

# How often calls look at the files, at most.
LOOK_S = 1.0

T = TypeVar("T")


class Renewed(Generic[T]):
    """`now` is what `make` gave of the files when they last could be used, or what was made of them already;
    `version` changes when they do. Both raise OSError or ValueError when they cannot be used, half written
    perhaps: that is the constructor's error, and later what there is stays."""

    def __init__(self, make: Callable[[], T], version: Callable[[], object], now: T | None = None) -> None:
        self._make = make
        self._version = version
        self._seen = version()
        self.now = make() if now is None else now

    def renew(self) -> bool:
        """Whether there is another one now."""
        try:
            if (version := self._version()) == self._seen:
                return False
            made = self._make()
        except (OSError, ValueError) as err:
            log.warning("the certificate in use stays, the new one cannot be read: %s", err)
            return False
        self.now, self._seen = made, version
        return True


class RenewedChannel(grpc.aio.Channel):
    """`make` gives a channel by the files as they are now, `version` changes when they do (Renewed)."""

    def __init__(self, make: Callable[[], grpc.aio.Channel], version: Callable[[], object]) -> None:
        self._files = Renewed(make, version)
        self._look_at = time.monotonic() + LOOK_S

    def current(self) -> grpc.aio.Channel:
        """What a call that begins now goes over. Not to be kept: it would never be closed."""
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_S
            self._files.renew()
        return self._files.now

    async def __aenter__(self) -> RenewedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._files.now.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._files.now.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel_ready()

    # A method that was kept would keep its channel.

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return lambda *call, **more: self.current().unary_unary(*args, **kwargs)(*call, **more)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return lambda *call, **more: self.current().unary_stream(*args, **kwargs)(*call, **more)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return lambda *call, **more: self.current().stream_unary(*args, **kwargs)(*call, **more)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return lambda *call, **more: self.current().stream_stream(*args, **kwargs)(*call, **more)
