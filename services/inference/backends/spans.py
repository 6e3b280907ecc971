"""Spans of the engines' work, children of the requests that asked for it, exported from inside Triton."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from opentelemetry.context import Context
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind

from services.core.telemetry import tracing
from services.inference.backends.jobs import Finish


def _parent(traceparent: str) -> Context | None:
    return extract({"traceparent": traceparent}) if traceparent else None


def forwarded_traceparent(parameters: str) -> str:
    """The traceparent among a request's parameters (JSON), where Triton puts the gRPC header."""
    try:
        return str(json.loads(parameters or "{}").get("traceparent", ""))
    except ValueError:
        return ""


class _Spans:
    """The tracer of one model."""

    def __init__(self, otlp_endpoint: str, model: str) -> None:
        self._stack = ExitStack()
        self.tracer = self._stack.enter_context(tracing("lingqu-triton", otlp_endpoint))
        self.model = model

    def close(self) -> None:
        self._stack.close()


class EngineSpan:
    """From the moment a sequence reached the engine until it ended."""

    def __init__(self, spans: _Spans, traceparent: str, prompt_tokens: int) -> None:
        attributes: dict[str, str | int] = {
            "lingqu.model": spans.model,
            "gen_ai.usage.input_tokens": prompt_tokens,
        }
        self._span = spans.tracer.start_span(
            "engine.generate", _parent(traceparent), SpanKind.INTERNAL, attributes
        )
        self._begun = time.monotonic()
        self.tokens = 0

    def add(self, tokens: int) -> None:
        if tokens and not self.tokens:
            self._span.set_attribute("lingqu.first_token_ms", (time.monotonic() - self._begun) * 1000)
        self.tokens += tokens

    def end(self, finish: Finish) -> None:
        self._span.set_attribute("gen_ai.usage.output_tokens", self.tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", [finish.name.lower()])
        self._span.end()


class EngineSpans(_Spans):
    """Spans of generated sequences."""

    def start(self, traceparent: str, prompt_tokens: int) -> EngineSpan:
        return EngineSpan(self, traceparent, prompt_tokens)


class VectorSpans(_Spans):
    """Spans of batches: one for each traced request in it, all as long as the batch."""

    @contextmanager
    def batch(self, parameters: Sequence[str]) -> Iterator[None]:
        traceparents = filter(None, map(forwarded_traceparent, parameters))
        attributes: dict[str, str | int] = {
            "lingqu.model": self.model,
            "lingqu.batch_requests": len(parameters),
        }
        spans = [
            self.tracer.start_span("engine.embed", _parent(t), SpanKind.INTERNAL, attributes)
            for t in traceparents
        ]
        try:
            yield
        finally:
            for span in spans:
                span.end()
