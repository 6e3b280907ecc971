"""Where the engine's tokens go inside Triton: to a session, or to one plain request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from services.inference.backends import wire
from services.inference.backends.engine import Finish
from services.inference.backends.spans import EngineSpan, EngineSpans
from services.inference.tokens import Detokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# With more sequences than this, a step's tokens wait for the next step's: the messages of a large batch
# would otherwise take the cores from the engine. First and last tokens never wait.
COALESCE_ABOVE = 16
REFUSALS = {
    Finish.FAILED: "the engine could not go on with this sequence; try again",
    Finish.REFUSED: "the engine refuses this sequence: a setting, or more than its KV cache can hold",
}


class SessionSink:
    """All sequences of one inference process: one message a step."""

    def __init__(self, sender: Any, spans: EngineSpans) -> None:
        self._sender = sender
        self._spans = spans
        self._open: dict[int, EngineSpan] = {}
        self._rows: list[wire.Row] = []
        self._held_steps = 0
        self._urgent = False

    def begin(self, key: int, traceparent: str, prompt_tokens: int) -> None:
        self._open[key] = self._spans.start(traceparent, prompt_tokens)

    def gone(self) -> bool:
        return bool(self._sender.is_cancelled())

    def emit(self, key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float] = ()) -> None:
        span = self._open.get(key)
        if span is None:
            return
        self._urgent |= bool(finish) or not span.tokens
        span.add(len(tokens))
        self._rows += wire.rows(key, tokens, finish, logprobs)
        if finish:
            del self._open[key]
            span.end(finish)

    def step_done(self, running: int) -> None:
        self._held_steps += 1
        if running > COALESCE_ABOVE and self._held_steps < 2 and not self._urgent:
            return
        rows, self._rows, self._held_steps, self._urgent = self._rows, [], 0, False
        if rows and not self.gone():
            self._send(rows)

    def alive(self) -> None:
        if not self.gone():
            self._send([])

    def _send(self, rows: list[wire.Row]) -> None:
        step = pb_utils.Tensor(wire.STEP, np.array(rows, dtype=np.int32).reshape(-1, wire.COLUMNS))
        self._sender.send(pb_utils.InferenceResponse([step]))


class RequestSink:
    """One sequence of a plain request: a response a step, with the text that became whole."""

    def __init__(self, sender: Any, detokenizer: Detokenizer, span: EngineSpan) -> None:
        self._sender = sender
        self._detokenizer = detokenizer
        self._span = span

    def gone(self) -> bool:
        return bool(self._sender.is_cancelled())

    def emit(self, key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float] = ()) -> None:
        self._span.add(len(tokens))
        text = self._detokenizer.push(tokens)
        if finish:
            text += self._detokenizer.finish()
            self._span.end(finish)
        if finish in REFUSALS:
            error = pb_utils.TritonError(REFUSALS[finish])
            self._sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
            return
        if tokens:
            outputs = [
                pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array(tokens, dtype=np.int32)),
            ]
            self._sender.send(pb_utils.InferenceResponse(outputs))
        if finish:
            self._sender.send(flags=FINAL)

    def step_done(self, running: int) -> None:
        """Nothing is held back."""

    def alive(self) -> None:
        """Nobody asks."""
