"""The metrics service where parts have identities: who may tell it figures, and certificates that are renewed
while senders go on."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as otlp
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceStub as OtlpStub,
)
from pydantic import ValidationError

from deploy.local.layout import HOST
from lingqu.metrics.v1 import answers_pb2, metrics_pb2
from lingqu.metrics.v1.answers_pb2_grpc import AnswerServiceStub
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from pipeline.exports import Exports, Record, Trust
from services.core import tls
from services.core.authority import Authority
from services.core.telemetry import metering
from services.core.tls import Identity
from services.metrics.app import MetricsSettings
from tests import metrics
from tests.metrics import Service
from tests.waiting import until

HOSTS = (HOST, "localhost")
QUERY = metrics_pb2.QueryRequest(measurement="sent", aggregate=metrics_pb2.AGGREGATE_LAST)


class Parts:
    """A CA of parts, and what it has signed, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.at(folder)

    def identity(self, name: str, into: Identity | None = None) -> Identity:
        """A new certificate; `into`: over the files of a former one, with this CA beside the former one."""
        folder = self.authority.certificate.parent
        if into is None:
            path, key = self.authority.issue(folder / f"{name}.pem", f"spiffe://lingqu/{name}", HOSTS)
            own = folder / f"{name}-ca.pem"
            own.write_bytes(self.authority.certificate.read_bytes())
            return Identity(path, key, own)
        self.authority.issue(into.certificate, f"spiffe://lingqu/{name}", HOSTS)
        into.ca.write_bytes(into.ca.read_bytes() + self.authority.certificate.read_bytes())
        return into


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "parts")


@pytest.fixture
async def service(tmp_path: Path, parts: Parts) -> AsyncIterator[Service]:
    own = parts.identity("metrics")
    async with metrics.running(tmp_path / "metrics", identity=own, plain=True) as running:
        yield running


def export(name: str, value: float = 1.0) -> otlp.ExportMetricsServiceRequest:
    request = otlp.ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name=name)
    metric.gauge.data_points.add(as_double=value, time_unix_nano=time.time_ns())
    return request


def credentials(identity: Identity) -> grpc.ChannelCredentials:
    certificate, key, ca = identity.read()
    return grpc.ssl_channel_credentials(ca, key, certificate)


async def told(channel: grpc.aio.Channel, name: str) -> grpc.StatusCode:
    stub: Any = OtlpStub(channel)
    try:
        await stub.Export(export(name), timeout=5)
    except grpc.aio.AioRpcError as err:
        return err.code()
    return grpc.StatusCode.OK


async def test_only_parts_may_tell_and_ask(tmp_path: Path, service: Service, parts: Parts) -> None:
    caller, foreign = parts.identity("inference"), Parts(tmp_path / "foreign").identity("inference")
    known = Identity(foreign.certificate, foreign.key, caller.ca)  # whom we would believe, and who are we?
    refused = {
        "in the clear": grpc.aio.insecure_channel(service.address),
        "of another CA": grpc.aio.secure_channel(service.address, credentials(known)),
        "without a certificate": grpc.aio.secure_channel(
            service.address, grpc.ssl_channel_credentials(caller.ca.read_bytes())
        ),
        "who does not believe it": grpc.aio.secure_channel(service.address, credentials(foreign)),
    }
    for who, channel in refused.items():
        async with channel:
            assert await told(channel, "sent") == grpc.StatusCode.UNAVAILABLE, who
    async with tls.channel(service.address, [], caller) as channel:
        assert await told(channel, "sent") == grpc.StatusCode.OK
        stub: Any = MetricsServiceStub(channel)
        await stub.Query(QUERY, timeout=5)
        answers: Any = AnswerServiceStub(channel)
        await answers.ReportAnswers(answers_pb2.ReportAnswersRequest(), timeout=5)
    assert service.store.values("sent") == [1.0]


async def test_http_is_for_parts_only_as_well(tmp_path: Path, service: Service, parts: Parts) -> None:
    url = f"{service.http.replace('http:', 'https:')}/v1/metrics"
    caller, foreign = parts.identity("inference"), Parts(tmp_path / "foreign").identity("inference")
    body, headers = export("sent").SerializeToString(), {"content-type": "application/x-protobuf"}

    async def answer(url: str, verify: ssl.SSLContext | bool = True) -> int:
        async with httpx.AsyncClient(verify=verify, trust_env=False) as client:
            return (await client.post(url, content=body, headers=headers)).status_code

    wrong = tls.client_context(Identity(foreign.certificate, foreign.key, caller.ca))
    nameless = ssl.create_default_context(cafile=str(caller.ca))
    for refused in (wrong, nameless, tls.client_context(foreign)):
        with pytest.raises(httpx.TransportError):
            await answer(url, refused)
    with pytest.raises(httpx.TransportError):
        await answer(f"{service.http}/v1/metrics")
    assert await answer(url, tls.client_context(caller)) == 200
    assert service.store.values("sent") == [1.0]


async def test_plain_ports_take_otlp_and_answer_nothing_else(service: Service) -> None:
    """For a user's own exporters, which have no certificate of the parts."""
    async with grpc.aio.insecure_channel(service.plain) as channel:
        assert await told(channel, "outside.grpc") == grpc.StatusCode.OK
        stub: Any = MetricsServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Query(QUERY, timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        answers: Any = AnswerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answers.ReportAnswers(answers_pb2.ReportAnswersRequest(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    body, headers = export("outside.http").SerializeToString(), {"content-type": "application/x-protobuf"}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{service.plain_http}/v1/metrics", content=body, headers=headers)
    assert answer.status_code == 200
    assert service.store.values("outside.grpc") == service.store.values("outside.http") == [1.0]


def test_plain_ports_are_for_this_machine_only() -> None:
    with pytest.raises(ValidationError, match="not on loopback"):
        MetricsSettings(metrics_plain_listen="0.0.0.0:4319")
    with pytest.raises(ValidationError, match="not on loopback"):
        MetricsSettings(metrics_plain_http_listen="metrics.example:4320")


async def test_figures_go_on_when_every_certificate_and_the_ca_are_renewed(
    tmp_path: Path, service: Service, parts: Parts
) -> None:
    """A sender that kept its first certificate would be refused: nobody believes the CA that it is from."""
    caller, server = parts.identity("registry"), service.identity
    assert server is not None
    async with AsyncExitStack() as stack:
        metered = ExitStack()
        stack.push_async_callback(asyncio.to_thread, metered.close)  # what it tells at the end is taken here
        meter = metered.enter_context(metering("gate", service.address, caller, "here", every_s=0.1))
        counter = meter.create_counter("ticks")

        def counted() -> float:
            return sum(service.store.values("ticks"))

        counter.add(1)
        await until(lambda: counted() == 1, "a tick has come")
        renewed = Parts(tmp_path / "renewed")
        renewed.identity("metrics", server).ca.write_bytes(renewed.authority.certificate.read_bytes())
        renewed.identity("registry", caller)
        counter.add(1)
        await until(lambda: counted() == 2, "another one has come")
    async with tls.channel(service.address, [], parts.identity("inference")) as former:
        assert await told(former, "sent") == grpc.StatusCode.UNAVAILABLE


async def test_a_training_tells_its_figures_as_a_part(tmp_path: Path, service: Service, parts: Parts) -> None:
    own, server = parts.identity("cli"), service.identity
    assert server is not None
    url, trust = service.http.replace("http:", "https:"), Trust(own.ca, (own.certificate, own.key))
    async with AsyncExitStack() as stack:
        training = ExitStack()
        stack.push_async_callback(asyncio.to_thread, training.close)
        exports = training.enter_context(Exports(url, "dropped", {"run": "tiny"}, trust=trust))

        async def tell(loss: float) -> None:
            exports.offer(Record({"lingqu.training.loss": loss}, {"run": "tiny"}, time.time_ns()))
            await until(
                lambda: service.store.values("training", "loss", run="tiny")[-1:] == [loss], f"{loss} is told"
            )

        await tell(2.5)
        former = tls.client_context(parts.identity("former"))
        renewed = Parts(tmp_path / "renewed")
        renewed.identity("metrics", server).ca.write_bytes(renewed.authority.certificate.read_bytes())
        renewed.identity("cli", own)
        await tell(1.5)
    former.check_hostname, former.verify_mode = False, ssl.CERT_NONE  # whoever it is that answers
    async with httpx.AsyncClient(verify=former, trust_env=False) as client:
        with pytest.raises(httpx.TransportError):
            await client.post(url)
