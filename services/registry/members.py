"""The members of one etcd: which is talked to, when to leave it for another, and what its errors mean."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from etcd3aio import _protobuf as pb

from services.core import tls
from services.core.errors import BackendUnavailable, LeaseExpired, LingquError, OutcomeUnknown, StoreFull
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tls import Identity

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
# A member that has lost its leader refuses such calls and ends such streams, instead of letting them hang.
METADATA = (("hasleader", "true"),)
# While etcd is away, this many clients a second are asked back, but nobody is told to wait for longer.
RETURNS_PER_S = 250
LONGEST_RETRY_S = 5.0

_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
# Refused before anything could have been changed.
_UNTOUCHED = ("failed to connect", "no leader", "too many requests", "proposal dropped")


class Member:
    """One etcd server and its stubs."""

    def __init__(self, address: str, identity: Identity | None = None) -> None:
        self.address = address
        self.channel = tls.channel(address, CHANNEL_OPTIONS, identity)
        self.kv: Any = pb.KVStub(self.channel)
        self.lease: Any = pb.LeaseStub(self.channel)
        self.watch: Any = pb.WatchStub(self.channel)


Send = Callable[[Member, float], Awaitable[Any]]


class Members:
    """One member is talked to until it fails; then the next. When none answers, etcd is `away` until a call
    that `probes` or a stream has worked: all other calls fail at once meanwhile.

    `crowd` is how many clients would come back at the same time; it spreads the retries they are told."""

    def __init__(self, endpoints: str, identity: Identity | None = None) -> None:
        self._members = [Member(address.strip(), identity) for address in endpoints.split(",")]
        self._at = 0
        self.away = False
        self.crowd = 0

    @property
    def current(self) -> Member:
        return self._members[self._at]

    async def close(self) -> None:
        for member in self._members:
            await member.channel.close()

    def leave(self, member: Member) -> None:
        """Talk to the next one, unless somebody has moved on already."""
        if member is self.current and len(self._members) > 1:
            self._at = (self._at + 1) % len(self._members)
            log.warning("left etcd member %s for %s", member.address, self.current.address)

    def unavailable(self, text: str) -> BackendUnavailable:
        error = BackendUnavailable(text)
        ceiling = min(LONGEST_RETRY_S, max(1.0, self.crowd / RETURNS_PER_S))
        error.retry_after_s = random.uniform(ceiling / 4, ceiling)  # noqa: S311 - spreads load
        return error

    def translated(self, err: grpc.aio.AioRpcError) -> LingquError:
        code, details = err.code(), err.details() or ""
        if code == grpc.StatusCode.NOT_FOUND and "lease" in details:
            return LeaseExpired("the lease has expired; register again")
        if "space exceeded" in details:
            return StoreFull()
        if code in _AWAY or any(text in details for text in _UNTOUCHED):
            return self.unavailable(f"etcd does not answer ({code.name}: {details})")
        return LingquError(f"etcd refuses ({code.name}: {details})")

    async def call(
        self, send: Send, *, repeatable: bool, probes: bool = False, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """The first answer of a member. What is not `repeatable` is sent again only if the first cannot have
        been executed. Raises BackendUnavailable (nothing was changed) or OutcomeUnknown."""
        if self.away and not probes:
            raise self.unavailable("etcd is out of reach; nothing was changed")
        for left in reversed(range(len(self._members))):
            member = self.current
            try:
                answer = await send(member, timeout_s)
            except grpc.aio.AioRpcError as err:
                error = self.translated(err)
                if not isinstance(error, BackendUnavailable):
                    self.away = False
                    raise error from err
                self.leave(member)
                if not repeatable and not any(text in (err.details() or "") for text in _UNTOUCHED):
                    text = f"etcd did not confirm the change ({err.details()}): its outcome is unknown"
                    raise OutcomeUnknown(text) from err
                if not left:
                    self.away = True
                    raise error from err
            else:
                self.away = False
                return answer
        raise AssertionError("unreachable: the last member returned or raised")
