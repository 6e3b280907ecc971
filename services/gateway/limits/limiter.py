"""Decides requests and charges tokens: here where we own the shard, otherwise where its owner is."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from services.core.errors import BackendUnavailable
from services.gateway.limits.clock import Clock
from services.gateway.limits.peers import NotOwnerError, Peers
from services.gateway.limits.questions import Batch, Question, Side
from services.gateway.limits.rules import Part, Rules
from services.gateway.limits.shard import Shard
from services.gateway.limits.shards import Shards
from services.gateway.limits.verdicts import UNLIMITED, Verdict

# For what nobody waits for: that a request has not passed after all.
TAKE_BACK_S = 1.0


class Limiter:
    """`rules` gives the rules of this moment. Everything ends at its deadline, a time of the event loop, with
    BackendUnavailable: whoever asked decides what that means."""

    def __init__(self, rules: Callable[[], Rules], shards: Shards, peers: Peers, clock: Clock) -> None:
        self._rules = rules
        self._shards = shards
        self._peers = peers
        self._clock = clock
        self._background: set[asyncio.Task[Verdict]] = set()

    async def decide(self, client: str, model: str, deadline: float) -> Verdict:
        """Whether one more request may pass, by all its limits."""
        of_client, of_model = self._rules().of(client, model)
        first = UNLIMITED
        if of_client is not None:
            question = Question(client, model, Side.CLIENT)
            first = self._at_once(of_client) or await self._ask(of_client.shard, question, deadline)
        if of_model is None or not first.admitted:
            return first
        try:
            question = Question(client, model, Side.MODEL)
            second = self._at_once(of_model) or await self._ask(of_model.shard, question, deadline)
        except BaseException:
            self._take_back(of_client, client, model, first)
            raise
        if not second.admitted:
            self._take_back(of_client, client, model, first)
        return (
            second
            if not second.admitted or of_client is None or second.remaining < first.remaining
            else first
        )

    async def answer(self, question: Question, deadline: float) -> Verdict:
        """A question that another control plane asks. Raises NotOwnerError."""
        part = self._part(question)
        if part is None:
            return UNLIMITED
        while (shard := self._shards.held(part.shard, self._clock())) is not None:
            verdict = self._settle(shard, part, question)
            if verdict is not None:
                return verdict
            await self._turn(deadline)
        raise NotOwnerError

    async def charge(self, batch: Batch, deadline: float) -> None:
        """Returns when all of it is on record. To be repeated, with the same sequence, if it fails."""
        shares: dict[tuple[int, Side], dict[tuple[str, str], int]] = defaultdict(dict)
        for (client, model), tokens in batch.usages.items():
            for side, part in zip(Side, self._rules().of(client, model), strict=True):
                if part is not None and any(rule.counts_tokens for rule in part.rules):
                    shares[part.shard, side][client, model] = tokens
        async with asyncio.TaskGroup() as group:
            for (shard, side), usages in shares.items():
                client, model = next(iter(usages))
                # A shard has both sides, and knows batches of each reporter by number: tell the sides apart.
                share = Batch(f"{batch.reporter}/{side.name}", batch.sequence, usages)
                question = Question(client, model, side, charge=share)
                group.create_task(self._ask(shard, question, deadline))

    def _at_once(self, part: Part) -> Verdict | None:
        """The verdict of a shard of ours that need not write first."""
        now = self._clock()
        shard = self._shards.held(part.shard, now)
        return shard.decide(part.rules, now) if shard is not None else None

    async def _ask(self, number: int, question: Question, deadline: float) -> Verdict:
        """Whoever owns the shard. Between two owners it waits for the next."""
        while True:
            owner = self._shards.owner(number)
            try:
                if self._shards.held(number, self._clock()) is not None or not owner:
                    return await self.answer(question, deadline)
                return await self._peers.ask(owner, question, deadline)
            except NotOwnerError:
                await self._turn(deadline)

    async def _turn(self, deadline: float) -> None:
        """Wait for what may change the answer. Whoever is cut off says so at once: another one may know."""
        if not self._shards.sure(self._clock()):
            raise BackendUnavailable("this control plane is cut off from the registry")
        try:
            async with asyncio.timeout_at(deadline):
                await self._shards.turn()
        except TimeoutError:
            raise BackendUnavailable("the limiter cannot decide in time") from None

    def _settle(self, shard: Shard, part: Part, question: Question) -> Verdict | None:
        """None: something has to be written first."""
        if question.take_back:
            shard.take_back(part.rules, question.take_back)
        elif question.charge is None:
            return shard.decide(part.rules, self._clock())
        else:
            amounts = self._amounts(question, question.charge)
            if not shard.charge(question.charge.reporter, question.charge.sequence, amounts, self._clock()):
                return None
        return UNLIMITED

    def _amounts(self, question: Question, batch: Batch) -> dict[str, int]:
        """Tokens by key."""
        amounts: dict[str, int] = defaultdict(int)
        for (client, model), tokens in batch.usages.items():
            part = self._rules().of(client, model)[question.side is Side.MODEL]
            for rule in part.rules if part is not None else ():
                if rule.counts_tokens:
                    amounts[rule.key] += tokens
        return amounts

    def _part(self, question: Question) -> Part | None:
        return self._rules().of(question.client, question.model)[question.side is Side.MODEL]

    def _take_back(self, part: Part | None, client: str, model: str, verdict: Verdict) -> None:
        """The client's limits have admitted a request that will not pass. If this is lost, too little is
        used."""
        if part is None:
            return
        question = Question(client, model, Side.CLIENT, take_back=verdict.admitted)
        deadline = asyncio.get_running_loop().time() + TAKE_BACK_S
        task = asyncio.ensure_future(self._ask(part.shard, question, deadline))
        self._background.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Verdict]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, and of no consequence
