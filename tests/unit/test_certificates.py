"""How long certificates last, read off files as they are and told as figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from services.core.authority import Authority
from services.core.certificates import DAYS_LEFT, Used, of, tell_days_left
from services.core.tls import Identity


def told(reader: InMemoryMetricReader) -> dict[str, float]:
    data = reader.get_metrics_data()
    return {
        str((point.attributes or {})["certificate"]): point.value  # type: ignore[union-attr]
        for resource in (data.resource_metrics if data is not None else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == DAYS_LEFT
        for point in metric.data.data_points
    }


def telling(*used: Used) -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    tell_days_left(MeterProvider([reader]).get_meter("test"), used)
    return reader


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.at(tmp_path / "ca")


def test_the_files_of_a_part_are_told_and_a_renewed_one_is_seen(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue(tmp_path / "part.pem", "spiffe://lingqu/part", ["127.0.0.1"], days=2)
    reader = telling(*of(Identity(certificate, key, authority.certificate)))
    found = told(reader)
    assert found["mtls"] == pytest.approx(2, abs=0.01)
    assert found["mtls-ca"] > 300
    authority.issue(certificate, "spiffe://lingqu/part", ["127.0.0.1"], days=40)
    assert told(reader)["mtls"] == pytest.approx(40, abs=0.01)


def test_one_that_is_over_has_less_than_nothing_left(tmp_path: Path, authority: Authority) -> None:
    certificate, _ = authority.issue(tmp_path / "part.pem", "", ["127.0.0.1"], days=-0.001)
    assert told(telling(Used("public", certificate)))["public"] == pytest.approx(-0.001, abs=0.001)


def test_of_a_chain_all_are_needed_and_of_authorities_one(tmp_path: Path, authority: Authority) -> None:
    short, _ = authority.issue(tmp_path / "short.pem", "", ["127.0.0.1"], days=1)
    both = tmp_path / "both.pem"
    both.write_bytes(short.read_bytes() + authority.certificate.read_bytes())
    found = told(telling(Used("chain", both), Used("bundle", both, authorities=True)))
    assert found["chain"] == pytest.approx(1, abs=0.01)
    assert found["bundle"] > 300


def test_what_cannot_be_read_is_said_once_and_has_no_value(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nonsense.pem").write_text("nonsense")
    good, _ = authority.issue(tmp_path / "good.pem", "", ["127.0.0.1"], days=5)
    later = tmp_path / "later.pem"
    reader = telling(Used("nonsense", tmp_path / "nonsense.pem"), Used("later", later), Used("good", good))
    assert told(reader).keys() == told(reader).keys() == {"good"}
    assert len(caplog.records) == 2
    later.write_bytes(good.read_bytes())
    assert told(reader).keys() == {"good", "later"}


def test_without_files_there_is_no_figure() -> None:
    assert told(telling(*of(None))) == {}
