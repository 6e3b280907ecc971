"""What Envoy, Triton, this machine and its GPUs tell, as readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2

from services.metrics import accesslog, scrape
from services.metrics.host import Gpus, Host
from services.metrics.readings import Kind

PAGE = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="echo",version="1"} 7
nv_inference_request_success{model="a b\\"c",version="2"} 1
nv_inference_request_failure{model="echo",reason="OTHER",version="1"} 2
nv_inference_request_failure{model="echo",reason="REJECTED",version="1"} 3
nv_inference_queue_duration_us{model="echo",version="1"} 1500000
nv_inference_pending_request_count{model="echo",version="1"} 4
nv_inference_count{model="echo",version="1"} none
nv_pinned_memory_pool_total_bytes 268435456
nv_cpu_utilization 0.5
nonsense {
"""


def test_tritons_page_becomes_totals_and_levels() -> None:
    found = {(r.labels["model"], r.kind): r for r in scrape.readings(PAGE, "host:8002")}
    echo = found["echo", Kind.TOTAL]
    assert echo.fields == {"requests": 7, "failures": 5, "queue_seconds": 1.5}
    assert echo.labels == {"triton": "host:8002", "model": "echo", "version": "1"}
    assert found["echo", Kind.LEVEL].fields == {"pending": 4}
    assert len(found) == 3


def test_a_model_that_comes_later_has_counted_since_the_page_before() -> None:
    triton = scrape.Watched("host:8002")
    line = 'nv_inference_request_success{{model="{}",version="1"}} 7\n'
    assert [r.start_ns for r in triton.readings(line.format("first"))] == [0]
    later = {
        r.labels["model"]: r.start_ns for r in triton.readings(line.format("first") + line.format("later"))
    }
    assert later["first"] == 0
    assert later["later"] > 0
    again = triton.readings(line.format("later"))
    assert again[0].start_ns == later["later"]


def test_a_page_of_nonsense_is_nothing() -> None:
    assert list(scrape.readings("\x00<html>", "x")) == []
    assert list(scrape.readings("", "x")) == []


def entry(cluster: str = "text/m/3", code: int = 200, **more: Any) -> Any:
    found = accesslog_pb2.HTTPAccessLogEntry()
    common = found.common_properties
    common.upstream_cluster = cluster
    common.start_time.FromNanoseconds(1_000_000_123_456_000)
    for name, ms in {"last_rx_byte": 1, "first_upstream_tx_byte": 2, "first_upstream_rx_byte": 30}.items():
        getattr(common, f"time_to_{name}").FromMilliseconds(ms)
    common.time_to_last_downstream_tx_byte.FromMilliseconds(45)
    found.request.request_headers["x-lingqu-client"] = "alice"
    found.request.request_body_bytes, found.request.request_headers_bytes = 100, 20
    found.response.response_body_bytes, found.response.response_headers_bytes = 1000, 30
    found.response.response_code.value = code
    for name, value in more.items():
        getattr(found.response, name).update(value)
    return found


def reading(*args: Any, **more: Any) -> Any:
    return accesslog.readings([entry(*args, **more)])[0]


def test_a_request_is_one_reading_with_its_times() -> None:
    found = reading(response_trailers={"grpc-status": "0"})
    assert found.measurement == "requests"
    assert found.labels == {"client": "alice", "model": "m", "version": "3", "status": "OK", "api": "text"}
    assert found.fields == pytest.approx(
        {
            "value": 1,
            "request_bytes": 120,
            "response_bytes": 1030,
            "received": 0.001,
            "upstream": 0.002,
            "first_byte": 0.03,
            "duration": 0.045,
        }
    )
    assert found.time_ns == 1_000_000_123_456_000


@pytest.mark.parametrize(
    ("cluster", "code", "more", "status"),
    [
        ("text/m/1", 200, {"response_trailers": {"grpc-status": "14"}}, "UNAVAILABLE"),
        ("text/m/1", 200, {"response_headers": {"grpc-status": "8"}}, "RESOURCE_EXHAUSTED"),
        ("text/m/1", 200, {"response_headers": {"grpc-status": "nonsense"}}, "UNKNOWN"),
        ("text/m/1", 200, {}, "CANCELLED"),
        ("text/m/1", 0, {}, "CANCELLED"),
        ("text/m/1", 503, {}, "UNAVAILABLE"),
        ("rest/m/1", 200, {}, "200"),
        ("rest", 404, {}, "404"),
        ("rest/m/1", 0, {}, "CANCELLED"),
        ("", 404, {"response_headers": {"content-type": "application/json"}}, "404"),
    ],
)
def test_how_a_request_ended(cluster: str, code: int, more: dict[str, Any], status: str) -> None:
    assert reading(cluster, code, **more).labels["status"] == status


def test_what_did_not_happen_has_no_field_and_unknown_clusters_no_name() -> None:
    empty = accesslog_pb2.HTTPAccessLogEntry()
    empty.common_properties.upstream_cluster = "whatever/else"
    found = accesslog.readings([empty])[0]
    assert found.fields == {"value": 1, "request_bytes": 0, "response_bytes": 0}
    assert found.labels["api"] == "other"


def test_of_a_request_that_no_replica_got_the_route_says_what_it_was_for() -> None:
    found = entry("", 503)
    found.common_properties.route_name = "text/m/3"
    labels = accesslog.readings([found])[0].labels
    assert labels == {"client": "alice", "model": "m", "version": "3", "status": "UNAVAILABLE", "api": "text"}


def tagged(status: str, **tags: str) -> Any:
    found = entry("tensor/m/1", response_trailers={"grpc-status": status})
    found.common_properties.custom_tags.update(tags)
    return accesslog.readings([found])[0].fields


def test_of_drawn_requests_those_that_went_well_are_counted() -> None:
    assert tagged("0", weight="50")["value"] == 50
    failed = tagged("14", weight="50")
    assert "value" not in failed
    assert failed["duration"] == failed["failed_after"] == pytest.approx(0.045)


def test_a_request_told_since_it_failed_counts_once_and_has_no_part_in_times() -> None:
    assert tagged("14", failure="1") == pytest.approx({"value": 1, "failed_after": 0.045})


def test_of_requests_that_are_all_told_failures_have_everything() -> None:
    assert tagged("14").keys() >= {"value", "duration", "failed_after", "request_bytes"}
    assert "failed_after" not in tagged("0")


def test_requests_that_go_on_are_not_counted_and_those_at_once_are_apart() -> None:
    going = entry()
    going.common_properties.intermediate_log_entry = True
    found = accesslog.readings([going, entry(), entry()])
    assert len({r.time_ns for r in found}) == len(found) == 2


def test_this_machine_tells_levels_and_what_was_added(tmp_path: Path) -> None:
    host = Host(tmp_path, "me")
    first, second = host.readings()[0], host.readings()[0]
    assert first.labels == {"host": "me"}
    assert 0 <= first.fields["cpu"] <= 1
    assert 0 < first.fields["memory_used"] < first.fields["memory_total"]
    assert 0 < first.fields["disk_used"] <= first.fields["disk_total"]
    assert "network_sent" not in first.fields
    assert second.fields.get("network_sent", 0) >= 0


class Nvml:
    """As much of pynvml as is asked, for two GPUs, the second of which does not tell its power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.open = 0
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        if self.broken:
            raise self.NVMLError("GPU is lost")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"NVIDIA L4" if handle else "NVIDIA L4"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return type("Memory", (), {"used": 1 << 30, "total": 24 << 30})

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return type("Rates", (), {"gpu": 75, "memory": 10})

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 60

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("Not Supported")
        return 70_500


def test_gpus_tell_what_they_can() -> None:
    nvml = Nvml()
    gpus = Gpus("me", lambda name: nvml)
    first, second = gpus.readings()
    assert first.labels == {"host": "me", "gpu": "0", "name": "NVIDIA L4"}
    assert first.fields == {
        "utilization": 0.75,
        "memory_used": 1 << 30,
        "memory_total": 24 << 30,
        "temperature": 60,
        "power": 70.5,
    }
    assert second.labels["name"] == "NVIDIA L4"
    assert "power" not in second.fields
    gpus.readings()
    assert nvml.open == 1  # once
    gpus.close()
    assert nvml.open == 0


def test_a_driver_that_fails_is_asked_again() -> None:
    nvml = Nvml()
    gpus = Gpus("me", lambda name: nvml)
    assert len(gpus.readings()) == 2
    nvml.broken = True
    assert gpus.readings() == gpus.readings() == []
    nvml.broken = False
    assert len(gpus.readings()) == 2


def test_without_nvml_there_are_no_gpus() -> None:
    def load(name: str) -> Any:
        raise ImportError(name)

    assert Gpus("me", load).readings() == []
