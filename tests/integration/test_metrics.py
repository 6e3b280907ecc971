"""The metrics service as its senders and readers meet it, and what it does when things go wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import Options, metrics
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from services.metrics import receivers, tails
from services.metrics.app import SERVICES, MetricsSettings
from services.metrics.app import running as service_running
from services.metrics.readings import Reading
from services.metrics.stores.duck import DuckStore
from tests.conftest import free_offset
from tests.influxes import influx
from tests.metrics import Memory, Service, running
from tests.waiting import until

HOUR_NS = 3_600_000_000_000
CUMULATIVE = metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
PROTOBUF, JSON = {"content-type": "application/x-protobuf"}, {"content-type": "application/json"}
DELTA = metrics_pb2.AGGREGATION_TEMPORALITY_DELTA


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with running(tmp_path) as made:
        yield made


@asynccontextmanager
async def stub(address: str, kind: Any) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield kind(channel)


def export(*points: tuple[str, float], at_ns: int = 0, temporality: Any = None, **labels: str) -> Any:
    """An export of gauges, or of sums that only rise, with name and value."""
    request = metrics_service_pb2.ExportMetricsServiceRequest()
    found = request.resource_metrics.add().scope_metrics.add()
    now = time.time_ns()
    for name, value in points:
        metric = found.metrics.add(name=name)
        if temporality is not None:
            metric.sum.aggregation_temporality, metric.sum.is_monotonic = temporality, True
        data = metric.gauge if temporality is None else metric.sum
        point = data.data_points.add(
            as_double=value, time_unix_nano=at_ns or now, start_time_unix_nano=now if temporality else 0
        )
        for key, label in labels.items():
            point.attributes.add(key=key).value.string_value = label
    return request


async def send(service: Service, request: Any, timeout: float = 10) -> Any:
    async with stub(service.address, metrics_service_pb2_grpc.MetricsServiceStub) as sender:
        return await sender.Export(request, timeout=timeout)


def details(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status: Any = rpc_status.from_call(error)
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            found = kind()
            detail.Unpack(found)
            return found
    return None


async def test_what_an_sdk_measures_is_kept_when_it_is_told_so(service: Service) -> None:
    def measure() -> None:
        exporter = OTLPMetricExporter(endpoint=service.address, insecure=True)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=60_000)
        provider = MeterProvider([reader], Resource.create({"service.name": "jobs"}))
        meter = provider.get_meter("test")
        counter, times = meter.create_counter("jobs.done"), meter.create_histogram("jobs.time")
        for round_ in range(3):
            counter.add(5, {"kind": "a", "request_id": f"r-{round_}"})
            times.record(0.02)
            provider.force_flush()
        provider.shutdown()

    await asyncio.to_thread(measure)
    labels = {"kind": "a", "service": "jobs"}
    assert sum(service.store.values("jobs.done", **labels)) == 15
    assert {p.labels for p in service.store.points if p.measurement == "jobs.done"} == {
        (("kind", "a"), ("service", "jobs"))
    }
    assert sum(service.store.values("jobs.time", "count", service="jobs")) == 3
    assert sum(service.store.values("jobs.time", "le_25", service="jobs")) == 3


async def test_bad_points_are_refused_and_the_sender_is_told(service: Service) -> None:
    now = time.time_ns()
    request = export(("good", 1), ("nan", float("nan")), ("inf", float("inf")), ("", 1), ("a\nb", 1))
    for at_ns in (now - 48 * HOUR_NS, now + HOUR_NS, 1):
        request.MergeFrom(export(("skewed", 1), at_ns=at_ns))
    answer = await send(service, request)
    assert answer.partial_success.rejected_data_points == 7
    for said in ("3 of a time", "2 of values", "2 of a measurement"):
        assert said in answer.partial_success.error_message
    assert service.store.values("good") == [1]
    assert not service.store.values("skewed")
    expected = {"time": 3, "number": 2, "name": 2}
    await until(
        lambda: all(
            sum(service.store.values("collector", what="refused", why=why)) == number
            for why, number in expected.items()
        ),
        "refusals are counted",
    )


async def test_lines_of_an_envoy_whose_clock_is_off_are_refused_and_counted(service: Service) -> None:
    message = als_pb2.StreamAccessLogsMessage()
    for ahead_s in (0, -30 * 3600, 600, 0):
        entry = message.http_logs.log_entry.add()
        entry.common_properties.upstream_cluster = "text/m/1"
        entry.common_properties.start_time.FromNanoseconds(time.time_ns() + ahead_s * 1_000_000_000)
    async with stub(service.address, als_pb2_grpc.AccessLogServiceStub) as sender:
        call = sender.StreamAccessLogs(timeout=10)
        await call.write(message)
        refused = ("collector", "value")
        await until(lambda: service.store.values(*refused, what="refused", why="time") == [2], "counted")
        assert service.store.values("requests", model="m") == [1, 1]
        call.cancel()


@pytest.mark.parametrize("number_of", [12_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
async def test_label_values_without_end_become_an_overflow_that_says_so(
    tmp_path: Path, number_of: int
) -> None:
    store = Memory()
    async with running(tmp_path, store=store) as service:
        batch = 4_000
        for start in range(0, number_of, batch):
            request = metrics_service_pb2.ExportMetricsServiceRequest()
            points = (
                request.resource_metrics.add().scope_metrics.add().metrics.add(name="m").gauge.data_points
            )
            for number in range(start, start + batch):
                point = points.add(as_int=number, time_unix_nano=time.time_ns())
                point.attributes.add(key="user").value.string_value = f"user-{number}"
            await send(service, request)
        series = [labels for name, labels in store.series("m", 100_000)]
        assert len(series) == 5_001
        assert (("overflow", "true"),) in series
        assert len(store.values("m")) == number_of
        # Counters cannot be told apart there.
        request = export(("m", 1), temporality=CUMULATIVE, user="new")
        assert (await send(service, request)).partial_success.rejected_data_points == 1
        await until(
            lambda: sum(store.values("collector", what="overflowed", why="m")) == number_of - 5_000 + 1,
            "the overflow is counted",
        )


async def test_a_store_that_is_away_is_told_and_nothing_is_lost_or_doubled(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "KEPT_WITHIN_S", 0.3)
    service.store.away.set()
    requests = [
        export(("total", 5), temporality=CUMULATIVE, kind="a"),
        export(("delta", 2), temporality=DELTA),
    ]
    for request in requests:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await send(service, request)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert details(refused.value, error_details_pb2.RetryInfo) is not None
    service.store.away.clear()

    async def sent(request: Any) -> bool:  # again and again, as every exporter does
        try:
            await send(service, request)
        except grpc.aio.AioRpcError:
            return False
        return True

    for request in requests:
        await until(lambda request=request: sent(request), "it is kept")
    assert service.store.values("total") == [5]
    assert service.store.values("delta") == [2]


async def test_a_full_queue_is_told_by_both_protocols(service: Service) -> None:
    service.store.away.set()
    service.intake.writer._most = 1
    await until(lambda: service.intake.writer.away and not service.intake.writer.room, "the queue is full")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await send(service, export(("m", 1)))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert details(refused.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    async with httpx2.AsyncClient() as http:
        answer = await http.post(
            f"{service.http}/v1/metrics",
            content=export(("m", 1)).SerializeToString(),
            headers={"content-type": "application/x-protobuf"},
        )
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    service.intake.take([Reading("m", {}, {"value": 1.0}, time.time_ns())])  # of a source that goes on
    service.store.away.clear()
    service.intake.writer._most = 1000
    await send(service, export(("m", 1)))
    await until(
        lambda: service.store.values("collector", what="refused", why="full"), "what found no room is counted"
    )


async def test_http_takes_protobuf_and_json_packed_or_not(service: Service) -> None:
    label = {"key": "k", "value": {"stringValue": "v"}}
    point = {"asDouble": 2.5, "timeUnixNano": str(time.time_ns()), "attributes": [label]}
    gauges = [{"name": "j", "gauge": {"dataPoints": [point]}}]
    as_json = {"resourceMetrics": [{"scopeMetrics": [{"metrics": gauges}]}]}
    body = export(("p", 1), ("nan", float("nan"))).SerializeToString()
    async with httpx2.AsyncClient(base_url=service.http) as http:
        kind = {"content-type": "application/x-protobuf"}
        answer = await http.post("/v1/metrics", content=body, headers=kind)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-protobuf"
        told = metrics_service_pb2.ExportMetricsServiceResponse.FromString(answer.content)
        assert told.partial_success.rejected_data_points == 1
        packed = await http.post(
            "/v1/metrics", content=gzip.compress(body), headers={**kind, "content-encoding": "gzip"}
        )
        assert packed.status_code == 200
        answer = await http.post("/v1/metrics", json=as_json)
        assert (answer.status_code, answer.json()) == (200, {})
        span = {"traceId": "5b8efff798038103d269b633813fc60c", "spanId": "eee19b7ec3c1b174", "name": "s"}
        spans = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
        assert (await http.post("/v1/traces", json=spans)).status_code == 200
    assert service.store.values("j", k="v") == [2.5]
    assert len(service.store.values("p")) == 2
    await until(lambda: service.store.values("collector", what="spans") == [1], "spans are counted")


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "text/plain"}, b"x", 415),
        ({}, b"x", 415),
        (PROTOBUF, b"\xff\xff\xff", 400),
        (JSON, b"{", 400),
        (JSON, b"[]", 400),
        (JSON, b'{"resourceMetrics": 7}', 400),
        (JSON, b"[" * 50_000, 400),
        (JSON, b'{"resourceSpans": [{"a": ' + b"[" * 900 + b"]" * 900 + b"}]}", 400),
        ({**PROTOBUF, "content-encoding": "gzip"}, b"no", 400),
        ({**PROTOBUF, "content-encoding": "br"}, b"no", 415),
        ({**PROTOBUF, "content-encoding": "gzip"}, gzip.compress(b"\0" * (17 << 20)), 413),
        (PROTOBUF, b"\0" * (17 << 20), 413),
    ],
)
async def test_bad_requests_are_refused_for_good(
    service: Service, headers: dict[str, str], body: bytes, status: int
) -> None:
    async with httpx2.AsyncClient(base_url=service.http) as http:
        answer = await http.post("/v1/metrics", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert "retry-after" not in answer.headers
        assert (await http.get("/v1/metrics")).status_code == 405
        assert (await http.post("/v1/nothing")).status_code == 404


async def test_a_malformed_export_by_grpc_is_invalid(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        call: Any = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\xff\xff\xff", timeout=5)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_spans_and_logs_are_taken_and_counted(service: Service) -> None:
    spans, logs = trace_service_pb2.ExportTraceServiceRequest(), logs_service_pb2.ExportLogsServiceRequest()
    for _ in range(3):
        spans.resource_spans.add().scope_spans.add().spans.add(name="s")
        logs.resource_logs.add().scope_logs.add().log_records.add()
    async with stub(service.address, trace_service_pb2_grpc.TraceServiceStub) as sender:
        await sender.Export(spans, timeout=5)
    async with stub(service.address, logs_service_pb2_grpc.LogsServiceStub) as sender:
        await sender.Export(logs, timeout=5)
    for what in ("spans", "logs"):
        await until(
            lambda what=what: service.store.values("collector", what=what) == [3], f"{what} are counted"
        )


async def test_health_and_reflection_are_answered(service: Service) -> None:
    async with stub(service.address, health_pb2_grpc.HealthStub) as health:
        for name in ("", *SERVICES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with stub(service.address, reflection_pb2_grpc.ServerReflectionStub) as reflection:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in reflection.ServerReflectionInfo(iter([asked]), timeout=5):
            assert set(SERVICES) <= {s.name for s in answer.list_services_response.service}


# Reading


def asked(**fields: Any) -> pb.QueryRequest:
    return pb.QueryRequest(**{"measurement": "m", "aggregate": pb.AGGREGATE_SUM, **fields})


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked(measurement=""), "measurement"),
        (asked(measurement="a\n"), "measurement"),
        (asked(field="x" * 201), "field"),
        (asked(aggregate=0), "aggregate"),
        (asked(aggregate=99), "aggregate"),
        (asked(percentile=5), "percentile"),
        (asked(aggregate=pb.AGGREGATE_PERCENTILE), "percentile"),
        (asked(aggregate=pb.AGGREGATE_PERCENTILE, percentile=100.5), "percentile"),
        (asked(aggregate=pb.AGGREGATE_PERCENTILE, percentile=float("nan")), "percentile"),
        (asked(window=Duration(nanos=500_000_000)), "window"),
        (asked(window=Duration(seconds=1), start_time=Timestamp(seconds=1)), "window"),
        (asked(start_time=Timestamp(seconds=2), end_time=Timestamp(seconds=2)), "start_time"),
        (asked(start_time=Timestamp(seconds=-5)), "start_time"),
        (asked(end_time=Timestamp(seconds=2**60)), "end_time"),
        (asked(end_time=Timestamp(nanos=-1)), "end_time.nanos"),
        (asked(filters=[pb.Filter(values=["x"])]), "filters[0].label"),
        (asked(filters=[pb.Filter(label="k")]), "filters[0].values"),
        (asked(filters=[pb.Filter(label="k", values=["x"])] * 2), "filters[1].label"),
        (asked(filters=[pb.Filter(label=f"k{n}", values=["x"]) for n in range(11)]), "filters"),
        (asked(group_by=["a", "a"]), "group_by"),
        (asked(group_by=[""]), "group_by[0]"),
        (asked(group_by=[f"k{n}" for n in range(11)]), "group_by"),
    ],
)
async def test_a_bad_question_is_told_which_field(request_: Any, field: str, reading: Service) -> None:
    async with stub(reading.address, MetricsServiceStub) as reader:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reader.Query(request_, timeout=5)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details(refused.value, error_details_pb2.BadRequest).field_violations] == [field]


@pytest.fixture(scope="module")
async def reading(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """One for questions that change nothing."""
    async with running(tmp_path_factory.mktemp("reading")) as made:
        yield made


async def test_what_was_sent_can_be_asked(tmp_path: Path) -> None:
    store: Any = DuckStore(tmp_path / "m.duckdb")
    async with running(tmp_path, store=store) as service:
        request = metrics_service_pb2.ExportMetricsServiceRequest()
        for model, factor in (("a", 1), ("b", 2)):
            for value in range(1, 101):
                at_ns = time.time_ns() - value * 1_000_000
                request.MergeFrom(export(("m", value * factor), at_ns=at_ns, model=model))
        await send(service, request)
        async with stub(service.address, MetricsServiceStub) as reader:
            question = asked(aggregate=pb.AGGREGATE_PERCENTILE, percentile=95, group_by=["model"])
            answer = await reader.Query(question, timeout=5)
            found = {s.labels["model"]: [sample.value for sample in s.samples] for s in answer.series}
            assert found == {"a": [95], "b": [190]}
            only = asked(filters=[pb.Filter(label="model", values=["b"])], window=Duration(seconds=3600))
            answer = await reader.Query(only, timeout=5)
            assert sum(sample.value for s in answer.series for sample in s.samples) == 10_100
            assert not (await reader.Query(asked(measurement="none"), timeout=5)).series
            listed = await reader.ListSeries(pb.ListSeriesRequest(measurement="m", page_size=1), timeout=5)
            assert [s.labels["model"] for s in listed.series] == ["a"]
            assert listed.truncated
            assert not (await reader.ListSeries(pb.ListSeriesRequest(measurement="m"), timeout=5)).truncated
            with pytest.raises(grpc.aio.AioRpcError, match="page_size"):
                await reader.ListSeries(pb.ListSeriesRequest(page_size=1001), timeout=5)


async def test_a_slow_question_holds_up_no_point(service: Service) -> None:
    service.store.slow = threading.Event()
    async with stub(service.address, MetricsServiceStub) as reader:
        questions = [asyncio.ensure_future(reader.Query(asked(), timeout=10)) for _ in range(8)]
        await asyncio.sleep(0)
        for n in range(5):
            await send(service, export((f"m{n}", 1)))
        assert not any(question.done() for question in questions)
        service.store.slow.set()
        await asyncio.gather(*questions)


async def test_a_store_that_is_away_answers_no_question(service: Service) -> None:
    service.store.away.set()
    async with stub(service.address, MetricsServiceStub) as reader:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reader.Query(asked(), timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    service.store.away.clear()


async def test_points_are_followed_as_they_come_in(service: Service) -> None:
    async with stub(service.address, MetricsServiceStub) as reader:
        filters = [pb.Filter(label="k", values=["x", "y"])]
        call = reader.Tail(pb.TailRequest(measurement="m", filters=filters), timeout=10)
        await until(lambda: bool(service.intake._tails), "it follows")
        await send(service, export(("m", 1), k="other"))
        await send(service, export(("other", 2), k="x"))
        await send(service, export(("m", 3), k="x"))
        found = await call.read()
        assert (found.measurement, dict(found.labels), dict(found.fields)) == ("m", {"k": "x"}, {"value": 3})
        call.cancel()
        await until(lambda: not service.intake._tails, "it is forgotten")


async def drained(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        continue


async def test_a_slow_tail_is_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "MAX_WAITING", 100)
    async with stub(service.address, MetricsServiceStub) as reader:
        call = reader.Tail(pb.TailRequest(measurement="m"), timeout=20)
        await until(lambda: bool(service.intake._tails), "it follows")
        await send(service, export(*([("m", 1)] * 101)))
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await drained(call)
        assert cut.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(cut.value, error_details_pb2.ErrorInfo).reason == "SLOW_TAIL"
    assert service.store.values("m")


async def test_a_tail_that_takes_nothing_is_cut_off(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing, so that what is sent to it fills the windows of its connection and then stalls."""
    monkeypatch.setattr(tails, "STALL_S", 0.3)
    async with stub(service.address, MetricsServiceStub) as reader:
        call = reader.Tail(pb.TailRequest(measurement="m"), timeout=60)
        await until(lambda: bool(service.intake._tails), "it follows")
        labels = {f"label{n}": "x" * 120 for n in range(8)}

        async def forgotten() -> bool:
            await send(service, export(*([("m", 1)] * 500), **labels))
            return not service.intake._tails

        await until(forgotten, "it is cut off", timeout_s=20)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await drained(call)
        assert cut.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(cut.value, error_details_pb2.ErrorInfo).reason == "SLOW_TAIL"


async def test_too_many_tails_are_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "MAX_TAILS", 1)
    async with stub(service.address, MetricsServiceStub) as reader:
        first = reader.Tail(pb.TailRequest(), timeout=10)
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reader.Tail(pb.TailRequest(), timeout=10).read()
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


# The process


def niceness(pid: int) -> set[int]:
    """Of the threads of a process; of none if one has just ended."""
    threads = [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    try:
        return {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
    except ProcessLookupError:
        return set()


async def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    layout = Layout(tmp_path, free_offset())
    part = metrics(layout, Options())
    assert not part.needs  # or `lingqu up` would wait for it at the end
    process = await Running.start(part, layout.logs)
    acknowledged = 0
    try:
        await process.until_ready()
        await until(lambda: niceness(process.pid) == {10}, "all of it goes behind what it measures")
        address = layout.address(at.METRICS)
        killer = asyncio.get_running_loop().call_later(
            0.7, lambda: process._process.send_signal(signal.SIGKILL)
        )
        async with stub(address, metrics_service_pb2_grpc.MetricsServiceStub) as sender:
            while True:
                try:
                    await sender.Export(export(*([("m", 1)] * 10)), timeout=5)
                except grpc.aio.AioRpcError:
                    break
                acknowledged += 10
        killer.cancel()
        await process.ended()
        process = await Running.start(part, layout.logs)
        await process.until_ready()
        async with stub(address, MetricsServiceStub) as reader:
            answer = await reader.Query(asked(), timeout=5)
        kept = sum(sample.value for s in answer.series for sample in s.samples)
        assert acknowledged <= kept <= acknowledged + 10
        assert acknowledged
    finally:
        await process.stop()


async def test_influxdb_in_place_of_duckdb(tmp_path: Path) -> None:
    """Asked while it is there; what is acknowledged while it is away is on disk, and comes to it later."""
    with influx(tmp_path / "influx") as server:
        layout = Layout(tmp_path, free_offset())
        cfg = MetricsSettings(
            metrics_listen=layout.address(at.METRICS),
            metrics_http_listen=layout.address(at.METRICS_HTTP),
            metrics_store=server.url,
            metrics_folder=tmp_path,
        )
        sender = partial(stub, cfg.metrics_listen, metrics_service_pb2_grpc.MetricsServiceStub)
        async with service_running(cfg):
            async with sender() as stub_:
                await stub_.Export(export(("m", 1), at_ns=time.time_ns()), timeout=10)
            server.kill()
            async with sender() as stub_:
                await stub_.Export(export(("m", 2), at_ns=time.time_ns()), timeout=10)
            assert list((tmp_path / "spool").iterdir())
        server.start()
        async with service_running(cfg), stub(cfg.metrics_listen, MetricsServiceStub) as reader:

            async def total() -> bool:
                answer = await reader.Query(asked(), timeout=10)
                return sum(sample.value for s in answer.series for sample in s.samples) == 3

            await until(total, "both are in InfluxDB")


async def test_two_collectors_before_one_influxdb(tmp_path: Path) -> None:
    """What both get, since a sender asked the second for what the first did not answer in time, is kept once;
    what one has acknowledged is there for who asks the other, also when InfluxDB was away."""
    with influx(tmp_path / "influx") as server:
        settings = []
        for name in "ab":
            layout = Layout(tmp_path / name, free_offset())
            settings.append(
                MetricsSettings(
                    metrics_listen=layout.address(at.METRICS),
                    metrics_http_listen=layout.address(at.METRICS_HTTP),
                    metrics_store=server.url,
                    metrics_folder=tmp_path / name,
                    grace_s=0.5,
                )
            )
        kind, now = metrics_service_pb2_grpc.MetricsServiceStub, time.time_ns()
        twice = export(("m", 1), at_ns=now, temporality=DELTA)
        async with (
            service_running(settings[0]),
            service_running(settings[1]),
            stub(settings[0].metrics_listen, kind) as first,
            stub(settings[1].metrics_listen, kind) as second,
            stub(settings[0].metrics_listen, MetricsServiceStub) as one,
            stub(settings[1].metrics_listen, MetricsServiceStub) as other,
        ):
            await asyncio.gather(first.Export(twice, timeout=10), second.Export(twice, timeout=10))
            server.kill()
            await first.Export(export(("m", 10), at_ns=now + 1), timeout=10)
            await second.Export(export(("m", 100), at_ns=now + 2), timeout=10)
            server.start()

            async def both_know() -> bool:
                answers = [await reader.Query(asked(), timeout=10) for reader in (one, other)]
                return [[s.value for series in a.series for s in series.samples] for a in answers] == [
                    [111]
                ] * 2

            await until(both_know, "all is there, once")


async def test_wrong_settings_are_told_at_once(tmp_path: Path) -> None:
    async def ended(**env: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.metrics", env=env, stderr=asyncio.subprocess.PIPE
        )
        said = (await process.communicate())[1].decode()
        return process.returncode, said

    code, said = await ended(LINGQU_METRICS_STORE="influx:8086", LINGQU_METRICS_LISTEN="nowhere")
    assert code == 2
    assert "LINGQU_METRICS_STORE" in said
    assert "LINGQU_METRICS_LISTEN" in said
    (tmp_path / "metrics.duckdb").write_text(json.dumps({"not": "a database"}))
    code, said = await ended(LINGQU_METRICS_FOLDER=str(tmp_path), LINGQU_METRICS_LISTEN="127.0.0.1:1")
    assert code == 1
    assert "cannot be opened as a store" in said
