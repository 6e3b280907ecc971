"""Where the engine's tokens go inside Triton: to a session, or to one plain request."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from services.inference.backends import wire
from services.inference.backends.jobs import Finish
from services.inference.backends.line import Line
from services.inference.backends.outbox import Outbox, Postable
from services.inference.backends.spans import EngineSpan, EngineSpans
from services.inference.tokens import Detokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
GONE_S = 0.2  # how often Triton is asked whether anybody reads: it costs another round
REFUSALS = {
    Finish.FAILED: "the engine could not go on with this sequence; try again",
    Finish.REFUSED: "the engine refuses this sequence: a setting, or more than its KV cache can hold",
}


class _Sink(Postable):
    """A request of Triton's whose answers go through the outbox."""

    def __init__(self, sender: Any, outbox: Outbox) -> None:
        self._sender = sender
        self._outbox = outbox
        self._lock = threading.Lock()  # what is emitted on the engine's thread is taken on the outbox's
        self._asked_at = time.monotonic()
        self._is_gone = False

    def gone(self) -> bool:
        return self._is_gone

    def send(self, response: Any, flags: int) -> None:
        if response is None:
            self._sender.send(flags=flags)
        else:
            self._sender.send(response, flags=flags)
        if not flags:
            self._ask()

    def _ask(self) -> None:
        """Whether anybody reads, if that was not asked lately."""
        now = time.monotonic()
        if now >= self._asked_at + GONE_S:
            self._asked_at = now
            try:
                self._is_gone = self._is_gone or bool(self._sender.is_cancelled())
            except Exception:  # Triton has given it up
                self._is_gone = True

    def failed(self) -> None:
        self._is_gone = True

    def step_done(self, running: int) -> None:
        self._outbox.add(self)


class SessionSink(_Sink):
    """All sequences of one inference process: one message a step, or one packet where there is a line."""

    def __init__(self, sender: Any, outbox: Outbox, spans: EngineSpans, line: Line | None = None) -> None:
        super().__init__(sender, outbox)
        self._spans = spans
        self._line = line
        self._open: dict[int, EngineSpan] = {}
        self._rows = b""

    def begin(self, key: int, traceparent: str, prompt_tokens: int) -> None:
        self._open[key] = self._spans.start(traceparent, prompt_tokens)

    def emit(self, key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float] = ()) -> None:
        span = self._open.get(key)
        if span is None:
            return
        span.add(len(tokens))
        with self._lock:
            self._rows += wire.rows(key, tokens, finish, logprobs)
        if finish:
            del self._open[key]
            span.end(finish)

    def alive(self) -> None:
        self._outbox.add(self)  # an empty message, if there is nothing to say

    def is_left(self) -> bool:
        """Whether its inference process has closed the session, or is gone."""
        if self._line is None:
            self._ask()
            return self.gone()
        return self.gone() or not self._line.is_open()

    def end(self) -> None:
        """The request that opened it is answered to the end."""
        self.failed()
        with contextlib.suppress(Exception):  # Triton knows already
            self._sender.send(flags=FINAL)

    def hand_over(self) -> bool:
        if self._line is None or self.gone():
            return False
        try:
            return self._line.send(self._taken())
        except OSError:
            self.failed()
            return True

    def take(self) -> list[tuple[Any, int]]:
        if self._line is not None:
            return [(None, 0)]
        step = np.frombuffer(self._taken(), np.int32).reshape(-1, wire.COLUMNS)
        return [(pb_utils.InferenceResponse([pb_utils.Tensor(wire.STEP, step)]), 0)]

    def send(self, response: Any, flags: int) -> None:
        if self._line is None:
            super().send(response, flags)
        else:
            self._line.finish()

    def failed(self) -> None:
        super().failed()
        if self._line is not None:
            self._line.close()

    def _taken(self) -> bytes:
        with self._lock:
            rows, self._rows = self._rows, b""
        return rows


class RequestSink(_Sink):
    """One sequence of a plain request: a response a step, with the text that became whole."""

    def __init__(self, sender: Any, outbox: Outbox, detokenizer: Detokenizer, span: EngineSpan) -> None:
        super().__init__(sender, outbox)
        self._detokenizer = detokenizer
        self._span = span
        self._text = ""
        self._tokens: list[int] = []
        self._finish = Finish.NONE

    def emit(self, key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float] = ()) -> None:
        self._span.add(len(tokens))
        text = self._detokenizer.push(tokens)
        if finish:
            text += self._detokenizer.finish()
            self._span.end(finish)
        with self._lock:
            self._text += text
            self._tokens += tokens
            self._finish = finish

    def alive(self) -> None:
        self._outbox.add(self)  # whether anybody reads is asked with the next message, even an empty one

    def take(self) -> list[tuple[Any, int]]:
        with self._lock:
            text, tokens, finish = self._text, self._tokens, self._finish
            self._text, self._tokens, self._finish = "", [], Finish.NONE
        if finish in REFUSALS:
            error = pb_utils.TritonError(REFUSALS[finish])
            return [(pb_utils.InferenceResponse(error=error), FINAL)]
        messages: list[tuple[Any, int]] = []
        if tokens or not finish:
            outputs = [
                pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array(tokens, dtype=np.int32)),
            ]
            messages.append((pb_utils.InferenceResponse(outputs), 0))
        if finish:
            messages.append((None, FINAL))
        return messages
