"""A continuous-batching text engine on a thread of its own: jobs go in, tokens come out step by step.

The runtime's scheduler decides which sequences a step computes; this module feeds it, reads what each step
made and hands it to the sinks. It knows nothing of Triton. Long prompts are fed in slices (slices.py), so
that they stall nobody. A runtime whose step fails is not trusted any more: OpenVINO GenAI's goes on failing
for ever after one bad request (seen), so it is closed and opened anew.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.inference.backends.jobs import Counts, Finish, Handle, Job, Runtime, Sampling, Sink
from services.inference.backends.slices import Slices

MAX_PENDING = 1024
IDLE_POLL_S = 0.2  # how soon a sink that gave up is noticed while nothing is computed
GATHER_S, GATHER_MOST_S = 0.003, 0.025  # for company, where most of a step would be new: each, in all
GATHER_TOKENS = 256  # of prompts; more are not computed in one step
LONG_STEP_S = 0.1  # after which what a step kept out is waited for in any case
LOOK_S = 0.2  # between two looks at what changes seldom: sinks that gave up, how full the KV cache is
ALIVE_S = 2.0  # how often sinks hear that the engine works, even if it has no token for them
REOPEN_S = (1.0, 30.0)  # between attempts to open a runtime again: at first, at most


class RuntimeBroken(Exception):
    """A step failed."""


@dataclass(slots=True)
class _Running:
    job: Job
    sink: Sink
    handle: Handle | None  # None while its prompt is computed in slices
    tokens: int = 0


class Engine:
    """Owns the thread that steps the runtime. `open_runtime` makes one; its errors are the constructor's.
    `flush` is called when sinks have been told of all of a step, `look` a few times a second. On the thread,
    as all that is given here."""

    def __init__(
        self,
        open_runtime: Callable[[], Runtime],
        log: Callable[[str], None],
        flush: Callable[[], None] = lambda: None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts = Counts()
        self._open = open_runtime
        self._runtime = open_runtime()
        self._log = log
        self._flush = flush
        self._look_elsewhere = look
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._slices = Slices()
        self._slice: Handle | None = None  # the one that is being computed
        self._next_id = 1
        self._alive_at = self._looked_at = time.monotonic()
        self._step_s = 0.0  # how long the last one took
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, sink: Sink) -> None:
        """Queue a job. Raises queue.Full when MAX_PENDING commands wait already."""
        if self._commands.qsize() >= MAX_PENDING:
            raise queue.Full
        self._commands.put(("submit", (job, sink)))

    def cancel(self, sink: Sink, key: int) -> None:
        """Stop a job after the step that is running; a finished one is left alone."""
        self._commands.put(("cancel", (sink, key)))

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except RuntimeBroken as err:
                self._log(f"engine failed, {len(self._running)} sequences lost: {err.__cause__!r}")
                self._fail_all()
                self._reopen()
            except Exception as err:
                # Whatever it was, it must not take the engine from everybody else.
                self._log(f"engine's loop failed, {len(self._running)} sequences lost: {err!r}")
                self._fail_all()
        self._fail_all()

    def _turn(self) -> None:
        self._take_commands()
        if not self._running:
            if self._slice is not None:
                self._slice.cancel()
            self._look_elsewhere()
            return
        if self._slices.waiting:
            self._feed_slice()
        begun = time.monotonic()
        try:
            self._runtime.step()
        except Exception as err:
            raise RuntimeBroken from err
        now = time.monotonic()
        self._step_s = now - begun
        self._publish()
        self._flush()
        if self._slice is not None:
            self._end_slice(self._slice, now)
        self._move_displaced()
        if now - self._looked_at >= LOOK_S:
            self._look(now)

    def _look(self, now: float) -> None:
        """At what changes seldom: between two steps both cores wait."""
        self._looked_at = now
        self._look_elsewhere()
        self._drop_abandoned()
        self.counts.cache = self._runtime.cache()
        if now - self._alive_at >= ALIVE_S:
            self._alive_at = now
            for sink in self._sinks():
                sink.alive()
            self._flush()

    def _take_commands(self) -> None:
        """All that wait; blocks a little while there is nothing to compute. What would be computed anew waits
        for others that come at the same moment: a step that has begun keeps them out until it ends."""
        after_long = self._step_s >= LONG_STEP_S
        if self._running and not after_long and self._commands.empty():
            return
        before, tokens, gathered_until = len(self._running), 0, 0.0
        wait = (GATHER_S if after_long else 0.0) if self._running else IDLE_POLL_S
        try:
            while True:
                verb, argument = self._commands.get(block=wait > 0, timeout=wait)
                self._obey(verb, argument)
                tokens += len(argument[0].input_ids) if verb == "submit" else 0
                gathered_until = gathered_until or time.monotonic() + GATHER_MOST_S
                is_mostly_new = after_long or len(self._running) > 2 * before
                is_worth = is_mostly_new and tokens < GATHER_TOKENS
                wait = min(GATHER_S, gathered_until - time.monotonic()) if is_worth else 0.0
        except queue.Empty:
            return

    def _obey(self, verb: str, argument: Any) -> None:
        """Submit or cancel; whoever is told of something at once is told now."""
        if verb == "submit":
            job, sink = argument
            number = self._new_number()
            self._running[number] = _Running(job, sink, None)
            self._begin(number)
        else:
            sink, key = argument
            for number, running in list(self._running.items()):
                if running.sink is sink and running.job.key == key:
                    self._end(number, Finish.CANCELLED)
                    sink.step_done(len(self._running))
                    self._flush()

    def _new_number(self) -> int:
        number, self._next_id = self._next_id, self._next_id + 1
        return number

    def _begin(self, number: int) -> None:
        """With a sequence, or with what is left of it."""
        job = self._running[number].job
        if self._slices.wants(job.input_ids):
            self._slices.push(number, job.input_ids)
        else:
            self._add(number)

    def _move_displaced(self) -> None:
        for number, rest in self._runtime.displaced():
            running = self._running.get(number)
            if running is not None:
                running.job, running.handle = rest, None
                self._begin(number)

    def _add(self, number: int) -> None:
        """Give a sequence to the runtime, or tell its sink why not."""
        running = self._running[number]
        try:
            running.handle = self._runtime.add(number, running.job)
        except Exception as err:
            self._log(f"job refused by the engine: {err!r}")
            del self._running[number]
            running.sink.emit(running.job.key, (), Finish.REFUSED)
            running.sink.step_done(len(self._running))
            self._flush()

    def _feed_slice(self) -> None:
        """The next part of a long prompt, if one is due: as a sequence of its own that makes one token, which
        nobody reads. The runtime keeps what it computed for those that begin alike."""
        if self._slice is not None:
            return
        decoding = any(running.handle is not None for running in self._running.values())
        due = self._slices.due(time.monotonic(), idle=not decoding)
        if due is None:
            return
        number, prefix = due
        if prefix is None:
            self._add(number)
            return
        try:
            job = Job(0, prefix, Sampling(max_tokens=1))
            self._slice = self._runtime.add(self._new_number(), job)
        except ValueError:
            self._slices.drop(number)
            self._add(number)

    def _end_slice(self, current: Handle, now: float) -> None:
        self._slices.spent(self._step_s)
        made = current.take()
        if made.tokens or made.finish:
            current.cancel()
            self._slice = None
            self._slices.computed(now)

    def _drop_abandoned(self) -> None:
        gone = {id(sink) for sink in self._sinks() if sink.gone()}
        if gone:
            for number, running in list(self._running.items()):
                if id(running.sink) in gone:
                    self._end(number, Finish.CANCELLED)

    def _sinks(self) -> list[Sink]:
        return list({id(r.sink): r.sink for r in self._running.values()}.values())

    def _publish(self) -> None:
        total, is_news = 0, False
        touched: dict[int, Sink] = {}
        ended: list[int] = []
        for number, running in self._running.items():
            if running.handle is None:
                continue
            tokens, logprobs, finish = running.handle.take()
            if not tokens and not finish:
                continue
            is_news |= not running.tokens or bool(finish)
            total += len(tokens)
            running.tokens += len(tokens)
            sink = running.sink
            sink.emit(running.job.key, tokens, finish, logprobs)
            touched[id(sink)] = sink
            if finish == Finish.REFUSED:
                running.handle.cancel()
            if finish:
                ended.append(number)
        for number in ended:
            del self._running[number]
        is_left = False
        for sink in touched.values():
            sink.step_done(len(self._running))
            is_left |= sink.gone()
        if is_left:
            self._drop_abandoned()
        self.counts.steps += 1
        self.counts.tokens += total
        self.counts.sequences = len(self._running)
        if is_news:
            self.counts.cache = self._runtime.cache()

    def _end(self, number: int, finish: Finish) -> None:
        running = self._running.pop(number)
        self._slices.drop(number)
        if running.handle is not None:
            running.handle.cancel()
        self.counts.wasted += running.tokens
        self.counts.sequences = len(self._running)
        running.sink.emit(running.job.key, (), finish)

    def _fail_all(self) -> None:
        sinks = self._sinks()
        for number in list(self._running):
            try:
                self._end(number, Finish.FAILED)
            except Exception as err:
                self._log(f"a sequence could not be told that it failed: {err!r}")
        for sink in sinks:
            try:
                sink.step_done(0)
            except Exception as err:
                self._log(f"a sink could not be told of failures: {err!r}")
        self._flush()

    def _reopen(self) -> None:
        """Until it works or the engine is closed. What is asked meanwhile waits, up to MAX_PENDING."""
        self._slices, self._slice = Slices(), None
        wait, most = REOPEN_S
        while not self._stopping.is_set():
            try:
                self._runtime = self._open()
            except Exception as err:
                self._log(f"the engine could not be opened again: {err!r}")
                self._stopping.wait(wait)
                wait = min(most, 2 * wait)
            else:
                self.counts.reopened += 1
                return
