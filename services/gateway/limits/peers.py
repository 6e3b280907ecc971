"""Questions to other control planes: what is asked in the same moment goes in one call."""

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
        asked, self._asked = self._asked, []
        for start in range(0, len(asked), MOST_TOGETHER):
            call = asyncio.ensure_future(self._call(asked[start : start + MOST_TOGETHER]))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, asked: list[tuple[Question, float, asyncio.Future[Verdict]]]) -> None:
        request = pb.DecideRequest(questions=[question.to_record() for question, _, _ in asked])
        left_s = max(deadline for _, deadline, _ in asked) - asyncio.get_running_loop().time()
        try:
            response = await self._stub.Decide(request, timeout=max(0.001, left_s))
        except grpc.aio.AioRpcError as err:
            for _, _, answer in asked:
                if not answer.done():
                    text = f"the owner of the limit at {self.address} does not answer ({err.code().name})"
                    answer.set_exception(BackendUnavailable(text))
            return
        for (_, _, answer), verdict in zip(asked, response.verdicts, strict=True):
            if answer.done():
                continue
            if verdict.state in (pb.Verdict.STATE_ADMITTED, pb.Verdict.STATE_REFUSED):
                answer.set_result(to_verdict(verdict))
            elif verdict.state == pb.Verdict.STATE_NOT_OWNER:
                answer.set_exception(NotOwnerError())
            else:
                answer.set_exception(
                    BackendUnavailable(f"the owner of the limit at {self.address} cannot say")
                )

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        await self._channel.close()


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
