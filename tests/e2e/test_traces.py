"""One trace from the client through Envoy and inference into Triton, and the figures of what was done, as a
real OTLP collector gets them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bench import suite as suites
from bench.suite import Suite
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from services.inference.figures import CACHE_HITS, CACHE_JOINED, COUNTERS, GAUGES, QUEUE_TIME
from tests.conftest import free_offset, show_logs
from tests.waiting import until


@dataclass(frozen=True, slots=True)
class Span:
    service: str
    name: str
    span_id: str
    parent_id: str


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Takes spans by OTLP/gRPC and keeps them by trace."""

    traces: dict[str, list[Span]] = field(default_factory=dict)
    figures: Figures = field(default_factory=lambda: Figures())

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = next(
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            )
            for span in (s for scope in resource.scope_spans for s in scope.spans):
                found = Span(service, span.name, span.span_id.hex(), span.parent_span_id.hex())
                self.traces.setdefault(span.trace_id.hex(), []).append(found)
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass
class Figures(metrics_service_pb2_grpc.MetricsServiceServicer):  # type: ignore[misc]
    """Takes figures by OTLP/gRPC and keeps the last value of each series."""

    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)

    async def Export(self, request: Any, context: Any) -> Any:
        scopes = (scope for resource in request.resource_metrics for scope in resource.scope_metrics)
        for metric in (m for scope in scopes for m in scope.metrics):
            for point in (*metric.sum.data_points, *metric.gauge.data_points, *metric.histogram.data_points):
                labels = tuple(sorted((a.key, a.value.string_value) for a in point.attributes))
                value = getattr(point, "count", 0) or point.as_double or point.as_int
                self.values[metric.name, labels] = value
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    server = grpc.aio.server()
    collector = Collector()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector.figures, server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield collector, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(scope="module")
async def traced(collector: tuple[Collector, str]) -> AsyncIterator[Suite]:
    async with suites.running(free_offset(), "--otlp", collector[1]) as running:
        try:
            yield running
        finally:
            show_logs(running.layout)


def new_context(sampled: bool = True) -> tuple[str, str, str]:
    """A trace id, the caller's span id, and both as a traceparent."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, f"00-{trace}-{span}-{'01' if sampled else '00'}"


async def chain(collector: Collector, trace: str, root: str, length: int) -> list[Span]:
    """The spans from the caller's down to the last, each the child of the one before."""

    def whole() -> list[Span] | None:
        spans = {span.parent_id: span for span in collector.traces.get(trace, [])}
        found, parent = [], root
        while parent in spans:
            found.append(spans[parent])
            parent = found[-1].span_id
        return found if len(found) >= length else None

    return await until(whole, f"{length} spans in one chain; there are {collector.traces.get(trace)}", 20)


async def test_generate_is_one_trace(traced: Suite, collector: tuple[Collector, str]) -> None:
    trace, root, traceparent = new_context()
    metadata = (("authorization", f"Bearer {traced.key}"), ("traceparent", traceparent))
    async with grpc.aio.insecure_channel(traced.public) as channel:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="The canal", max_tokens=4, no_cache=True)
        call: Any = InferenceServiceStub(channel).StreamGenerate(request, metadata=metadata, timeout=20)
        while await call.read() is not grpc.aio.EOF:
            continue
    spans = await chain(collector[0], trace, root, 3)
    assert [span.service for span in spans] == ["lingqu-gateway", "lingqu-inference", "lingqu-triton"]
    assert spans[2].name == "engine.generate"


async def test_embed_is_one_trace(traced: Suite, collector: tuple[Collector, str]) -> None:
    trace, root, traceparent = new_context()
    metadata = (("authorization", f"Bearer {traced.key}"), ("traceparent", traceparent))
    async with grpc.aio.insecure_channel(traced.public) as channel:
        request = pb.EmbedRequest(model=VECTOR_MODEL, inputs=["a canal"])
        await InferenceServiceStub(channel).Embed(request, metadata=metadata, timeout=20)
    spans = await chain(collector[0], trace, root, 3)
    assert [span.service for span in spans] == ["lingqu-gateway", "lingqu-inference", "lingqu-triton"]


async def test_tensors_are_traced_into_triton(traced: Suite, collector: tuple[Collector, str]) -> None:
    trace, root, traceparent = new_context()
    headers = {"authorization": f"Bearer {traced.key}", "traceparent": traceparent}
    inputs = [triton.InferInput(name, [1, 2], "INT64") for name in ("input_ids", "attention_mask")]
    for tensor in inputs:
        tensor.set_data_from_numpy(np.ones((1, 2), np.int64))
    with triton.InferenceServerClient(traced.public) as client:
        await asyncio.to_thread(client.infer, VECTOR_MODEL, inputs, headers=headers)
    spans = await chain(collector[0], trace, root, 2)
    assert [span.service for span in spans] == ["lingqu-gateway", "lingqu-triton"]


async def test_what_the_caller_does_not_sample_is_not_exported(
    traced: Suite, collector: tuple[Collector, str]
) -> None:
    silent, _, unsampled = new_context(sampled=False)
    trace, root, sampled = new_context()
    async with grpc.aio.insecure_channel(traced.public) as channel:
        stub = InferenceServiceStub(channel)
        for traceparent in (unsampled, sampled):
            metadata = (("authorization", f"Bearer {traced.key}"), ("traceparent", traceparent))
            request = pb.GenerateRequest(model=TEXT_MODEL, prompt="The canal", max_tokens=2, no_cache=True)
            await stub.Generate(request, metadata=metadata, timeout=20)
    await chain(collector[0], trace, root, 3)
    assert silent not in collector[0].traces


async def test_a_failed_call_is_a_failed_span(traced: Suite, collector: tuple[Collector, str]) -> None:
    trace, root, traceparent = new_context()
    metadata = (("authorization", f"Bearer {traced.key}"), ("traceparent", traceparent))
    async with grpc.aio.insecure_channel(traced.public) as channel:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="The canal", max_tokens=0)
        with pytest.raises(grpc.aio.AioRpcError):
            await InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=20)
    spans = await chain(collector[0], trace, root, 2)
    assert [span.service for span in spans] == ["lingqu-gateway", "lingqu-inference"]


async def test_tokens_that_nobody_got_are_told(traced: Suite, collector: tuple[Collector, str]) -> None:
    metadata = (("authorization", f"Bearer {traced.key}"),)
    async with grpc.aio.insecure_channel(traced.public) as channel:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="Count: 1 2 3 4", max_tokens=4000)
        call: Any = InferenceServiceStub(channel).StreamGenerate(request, metadata=metadata, timeout=20)
        for _ in range(10):
            await call.read()
        call.cancel()

    def told() -> float:
        names = {name for name, _ in collector[0].figures.values}
        wasted = (
            "lingqu.inference.tokens.wasted",
            (("model", TEXT_MODEL), ("outcome", "cancelled"), ("version", "1")),
        )
        everything = {*COUNTERS, *GAUGES, QUEUE_TIME} - {
            CACHE_HITS,
            CACHE_JOINED,
        }  # what did not happen is not told
        return everything <= names and collector[0].figures.values.get(wasted, 0)

    assert 10 <= await until(told, f"all figures; there are {collector[0].figures.values}", 20) < 400
