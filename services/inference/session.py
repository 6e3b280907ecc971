"""This process's session with a text model in Triton: one stream for all sequences (backends/wire.py)."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from services.core.discovery import VersionKey
from services.core.errors import BackendUnavailable, InvalidInput, LingquError, QueueFull
from services.inference.backends import wire
from services.inference.backends.jobs import Finish, Job, Sampling
from services.inference.backends.line import Listener
from services.inference.triton import Triton, command_request

log = logging.getLogger(__name__)

OPEN_ID, BATCH_ID = "open", "batch"
MAX_BATCH = 256  # commands in a message
MAX_BATCH_TOKENS = 100_000  # of prompts in a message, after which no more are put into it


@dataclass(frozen=True, slots=True)
class Step:
    """What one or more steps of the engine gave one sequence."""

    tokens: tuple[int, ...]
    finish: Finish
    logprobs: tuple[float, ...] = ()


class Session:
    """Lives from the version's load to its unload or to the loss of Triton; `lost` is then set."""

    def __init__(self, triton: Triton, key: VersionKey, secret: str, max_sequences: int) -> None:
        self._secret = secret
        self._triton = triton
        self._key = key
        self._id = uuid.uuid4().hex
        self._max = max_sequences
        self._next = 1
        self._outgoing: deque[wire.Command] = deque()
        self._more, self._taken = asyncio.Event(), asyncio.Event()
        self._sent: tuple[wire.Command, ...] = ()  # the batch that is not taken yet
        self._waiting: dict[int, asyncio.Queue[Step | LingquError]] = {}
        self._scores: dict[int, asyncio.Future[npt.NDArray[np.float32]]] = {}
        self.lost = asyncio.Event()
        self.last_heard = time.monotonic()
        self._why_lost = ""
        self._taken.set()
        self._line = Listener(secret, self._on_rows, lambda: self.lose("its process ended"))
        self._reader = asyncio.create_task(self._read(), name=f"session {key}")

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + len(self._scores)

    @property
    def silent_s(self) -> float:
        """For how long the engine has owed us something and said nothing; 0 while it owes nothing."""
        return time.monotonic() - self.last_heard if self.in_flight else 0.0

    def lose(self, why: str) -> None:
        """Give the engine up: whoever waits for it is told."""
        self._why_lost = why
        self._reader.cancel()

    async def close(self) -> None:
        self._line.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def generate(
        self, prompt: list[int], sampling: Sampling, traceparent: str = ""
    ) -> AsyncGenerator[Step, None]:
        """Tokens as they come; the last step has a finish. Leaving the iteration early stops the engine.

        Raises QueueFull at max_sequences, BackendUnavailable when Triton is lost."""
        if self.lost.is_set():
            raise BackendUnavailable(f"{self._key} is being loaded again")
        if len(self._waiting) >= self._max:
            raise QueueFull(f"{self._max} requests for {self._key} are in progress already")
        key, self._next = self._next, self._next + 1
        steps: asyncio.Queue[Step | LingquError] = asyncio.Queue()
        self._owe()
        self._waiting[key] = steps
        self._send("submit", key, Job(key, prompt, sampling), traceparent)
        finished = False
        try:
            while not finished:
                step = _merged(await steps.get(), steps)
                if isinstance(step, LingquError):
                    finished = True
                    raise step
                finished = step.finish != Finish.NONE
                if step.finish == Finish.REFUSED:
                    raise InvalidInput(
                        "max_tokens",
                        f"the engine of {self._key} cannot hold prompt and answer in its KV cache",
                    )
                if step.finish == Finish.FAILED:
                    raise BackendUnavailable(f"the engine of {self._key} could not go on with the request")
                yield step
        finally:
            del self._waiting[key]
            if not finished:
                self._send("cancel", key)

    async def score(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """FP32 [tokens - 1]: log-probability of each token but the first.

        Raises BackendUnavailable, QueueFull."""
        if self.lost.is_set():
            raise BackendUnavailable(f"{self._key} is being loaded again")
        if len(self._scores) >= self._max:
            raise QueueFull(f"{self._max} texts for {self._key} are being scored already")
        key, self._next = self._next, self._next + 1
        self._owe()
        found = self._scores[key] = asyncio.get_running_loop().create_future()
        self._send("score", key, Job(key, ids, Sampling(max_tokens=1)))
        try:
            logprobs: npt.NDArray[np.float32] = await found
            return logprobs
        finally:
            del self._scores[key]
            if not found.done() or found.cancelled():
                self._send("cancel", key)

    def _owe(self) -> None:
        """From now on the engine owes us something."""
        if not self.in_flight:
            self.last_heard = time.monotonic()

    def _send(self, op: str, key: int = 0, job: Job | None = None, traceparent: str = "") -> None:
        self._outgoing.append(wire.Command(op, self._id, self._secret, key, job, traceparent))
        self._more.set()

    async def _requests(self) -> AsyncGenerator[Any, None]:
        """One batch at a time: what comes while it is not taken goes with the next one."""
        begin = wire.Command("open", self._id, self._secret, line=self._line.address)
        yield command_request(self._key, OPEN_ID, wire.dump(begin))
        while True:
            await self._more.wait()
            await self._taken.wait()
            batch: list[wire.Command] = []
            size = 0
            while self._outgoing and len(batch) < MAX_BATCH and size < MAX_BATCH_TOKENS:
                command = self._outgoing.popleft()
                size += len(command.job.input_ids) if command.job is not None else 0
                if command.op == "score":  # answered when it is computed, and by itself
                    yield command_request(self._key, str(command.key), wire.dump(command))
                else:
                    batch.append(command)
            if not self._outgoing:
                self._more.clear()
            if batch:
                self._sent = tuple(batch)
                self._taken.clear()
                whole = wire.Command("batch", self._id, self._secret, parts=self._sent)
                yield command_request(self._key, BATCH_ID, wire.dump(whole))

    async def _read(self) -> None:
        reason = "the session with Triton ended"
        try:
            async with aclosing(self._requests()) as requests:
                call = self._triton.stream(requests)
                try:
                    async for answer in call:
                        self._on_answer(answer)
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as err:
            reason = f"Triton was lost ({err.code().name})"
            log.warning("session of %s: %s", self._key, reason)
        finally:
            self._line.close()
            self.lost.set()
            reason = self._why_lost or reason
            for steps in self._waiting.values():
                steps.put_nowait(BackendUnavailable(f"{self._key}: {reason}; try again"))
            for score in self._scores.values():
                if not score.done():
                    score.set_exception(BackendUnavailable(f"{self._key}: {reason}; try again"))

    def _on_answer(self, answer: Any) -> None:
        self.last_heard = time.monotonic()
        response, error = answer.infer_response, answer.error_message
        if response.id == OPEN_ID:
            if error:
                log.error("session of %s refused: %s", self._key, error)
                self._reader.cancel()
            elif response.raw_output_contents:
                self._on_rows(response.raw_output_contents[0])
        elif response.id == BATCH_ID:
            self._on_taken(response, error)
        elif (score := self._scores.get(int(response.id or 0))) is not None and not score.done():
            if error:
                score.set_exception(LingquError(f"{self._key}: {error}"))
            elif response.outputs and response.outputs[0].name == wire.LOGPROBS:
                score.set_result(np.frombuffer(response.raw_output_contents[0], np.float32))

    def _on_taken(self, response: Any, error: str) -> None:
        """The batch is with the engine, but for what it refused."""
        sent, self._sent = self._sent, ()
        self._taken.set()
        if error:
            errors = {str(command.key): error for command in sent}
        else:
            errors = json.loads(response.raw_output_contents[0][wire.BYTES_PREFIX :])
        for key, why in errors.items():
            if (steps := self._waiting.get(int(key))) is not None:
                steps.put_nowait(LingquError(f"{self._key}: {why}"))

    def _on_rows(self, packed: bytes) -> None:
        """What one or more steps made, or nothing: the engine works."""
        self.last_heard = time.monotonic()
        rows = np.frombuffer(packed, np.int32).reshape(-1, wire.COLUMNS).tolist()
        tokens: dict[int, list[int]] = {}
        logprobs: dict[int, list[float]] = {}
        ended: dict[int, Finish] = {}
        for key, token, finish, bits in rows:
            tokens.setdefault(key, [])
            if token != wire.NO_TOKEN:
                tokens[key].append(token)
                if bits:
                    logprobs.setdefault(key, []).append(wire.logprob(bits))
            if finish:
                ended[key] = Finish(finish)
        for key, new in tokens.items():
            if (steps := self._waiting.get(key)) is not None:
                told = tuple(logprobs.get(key, ()))
                steps.put_nowait(Step(tuple(new), ended.get(key, Finish.NONE), told))


def _merged(first: Step | LingquError, more: asyncio.Queue[Step | LingquError]) -> Step | LingquError:
    """`first` with all that arrived behind it: a consumer that lags gets fewer, larger steps."""
    while isinstance(first, Step) and not more.empty():
        following = more.get_nowait()
        if isinstance(following, LingquError):
            return following
        first = Step(first.tokens + following.tokens, following.finish, first.logprobs + following.logprobs)
    return first
