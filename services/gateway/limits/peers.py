"""Questions to other control planes, many in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from lingqu.gateway.v1 import limiter_pb2 as pb
from lingqu.gateway.v1.limiter_pb2_grpc import LimiterServiceStub
from services.core import tls
from services.core.errors import BackendUnavailable
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tls import Identity
from services.gateway.limits.questions import Question, to_verdict
from services.gateway.limits.verdicts import Verdict

# Questions on their way to one owner; more are refused at once. And how many go together at most.
MOST_WAITING = 10_000
MOST_TOGETHER = 1_000
# Calls to one owner at once: what is asked meanwhile goes together with the next. More than one, because a
# question may have to wait for the ledger.
MOST_CALLS = 4


class NotOwnerError(Exception):
    """Whoever was asked does not own the shard."""


class _Peer:
    """One other control plane."""

    def __init__(self, address: str, identity: Identity | None) -> None:
        self.address = address
        self._channel = tls.channel(address, CHANNEL_OPTIONS, identity)
        self._stub = LimiterServiceStub(self._channel)
        self._asked: list[tuple[Question, float, asyncio.Future[Verdict]]] = []
        self._waiting = 0
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, question: Question, deadline: float) -> Verdict:
        if self._waiting >= MOST_WAITING:
            raise BackendUnavailable(f"too many questions wait for {self.address}")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Verdict] = loop.create_future()
        if not self._asked:
            loop.call_soon(self._send)
        self._asked.append((question, deadline, answer))
        self._waiting += 1
        try:
            return await answer
        finally:
            self._waiting -= 1

    def _send(self) -> None:
        """What has gathered, unless enough is on its way: then with the end of a call."""
        while self._asked and len(self._calls) < MOST_CALLS:
            asked, self._asked = self._asked[:MOST_TOGETHER], self._asked[MOST_TOGETHER:]
            asked = [(question, end, answer) for question, end, answer in asked if not answer.done()]
            if asked:
                call = asyncio.ensure_future(self._call(asked))
                self._calls.add(call)
                call.add_done_callback(self._sent)

    def _sent(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._send()

    async def _call(self, asked: list[tuple[Question, float, asyncio.Future[Verdict]]]) -> None:
        request = pb.DecideRequest(questions=[question.to_record() for question, _, _ in asked])
        left_s = max(deadline for _, deadline, _ in asked) - asyncio.get_running_loop().time()
        why = "was left"
        try:
            response = await self._stub.Decide(request, timeout=max(0.001, left_s))
            for (_, _, answer), verdict in zip(asked, response.verdicts, strict=True):
                _settle(answer, verdict)
            why = "cannot say"
        except grpc.aio.AioRpcError as err:
            why = f"does not answer ({err.code().name})"
        finally:
            for _, _, answer in asked:
                if not answer.done():
                    answer.set_exception(BackendUnavailable(f"the limit's owner at {self.address} {why}"))

    async def close(self) -> None:
        for _, _, answer in self._asked:
            answer.cancel()
        self._asked.clear()
        for call in self._calls:
            call.cancel()
        await self._channel.close()


def _settle(answer: asyncio.Future[Verdict], verdict: pb.Verdict) -> None:
    """Leaves open what the owner could not say."""
    if answer.done():
        return
    if verdict.state in (pb.Verdict.STATE_ADMITTED, pb.Verdict.STATE_REFUSED):
        answer.set_result(to_verdict(verdict))
    elif verdict.state == pb.Verdict.STATE_NOT_OWNER:
        answer.set_exception(NotOwnerError())


class Peers:
    """A connection to each control plane that was asked and is still there."""

    def __init__(self, identity: Identity | None = None) -> None:
        self._peers: dict[str, _Peer] = {}
        self._identity = identity

    async def ask(self, address: str, question: Question, deadline: float) -> Verdict:
        """`deadline` is a time of the event loop. Raises NotOwnerError and BackendUnavailable."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address, self._identity)
        return await peer.ask(question, deadline)

    async def keep(self, addresses: Iterable[str]) -> None:
        """Close the connections to all others."""
        for address in self._peers.keys() - set(addresses):
            await self._peers.pop(address).close()
