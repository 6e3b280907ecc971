"""`lingqu up --tls`: the public port and all connections between the parts, with what it makes itself."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import grpc
import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

import lingqu
from bench import suite as suites
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.metrics.v1 import metrics_pb2
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from services.core import tls
from services.core.authority import Authority
from services.core.telemetry import metering
from services.core.tls import Identity
from tests.conftest import free_offset, show_logs
from tests.waiting import until


@pytest.fixture(scope="module")
async def secured() -> AsyncIterator[Suite]:
    offset = free_offset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINGQU_METRICS_PLAIN_LISTEN", f"{at.HOST}:{PLAIN + offset}")
        async with suites.running(offset, "--tls") as running:
            try:
                await running.publish_echo()
                yield running
            finally:
                show_logs(running.layout)


# Where the metrics service takes OTLP from programs that have no certificate.
PLAIN = 4319


def cli(suite: Suite) -> Identity:
    found = suite.layout.identity("cli")
    assert found is not None
    return found


def ca(suite: Suite) -> Path:
    assert suite.layout.public_ca is not None
    return suite.layout.public_ca


async def test_every_client_works(secured: Suite) -> None:
    async with lingqu.Client(secured.public, secured.key, ca=ca(secured)) as client:
        answer = await client.generate("smollm2-135m-instruct", "The canal", max_tokens=3)
        assert answer.usage.completion_tokens == 3
        chunks = [c async for c in client.stream("smollm2-135m-instruct", "The canal", max_tokens=3)]
        assert chunks[-1].usage.completion_tokens == 3

    trust = ssl.create_default_context(cafile=str(ca(secured)))
    headers = {"authorization": f"Bearer {secured.key}"}
    async with httpx.AsyncClient(verify=trust, headers=headers, trust_env=False, timeout=30) as rest:
        body = {"model": "minilm-l6-v2", "input": "a canal"}
        openai = await rest.post(f"https://{secured.public}/v1/embeddings", json=body)
        assert len(openai.json()["data"][0]["embedding"]) == 384
        own = await rest.post(
            f"https://{secured.public}/v1/models/minilm-l6-v2:embed", json={"inputs": ["a"]}
        )
        assert len(own.json()["embeddings"][0]["values"]) == 384

    def tensors() -> list[int]:
        client = triton.InferenceServerClient(secured.public, ssl=True, root_certificates=str(ca(secured)))
        numbers = triton.InferInput("INPUT", [1, 2], "INT32")
        numbers.set_data_from_numpy(np.array([[1, 2]], np.int32))
        found = client.infer("echo", [numbers], headers=headers).as_numpy("OUTPUT")
        return list(found.flatten())

    assert await asyncio.to_thread(tensors) == [1, 2]


async def test_days_left_of_every_certificate_are_told(secured: Suite) -> None:
    request = metrics_pb2.QueryRequest(
        measurement="lingqu.certificate.days_left",
        aggregate=metrics_pb2.AGGREGATE_LAST,
        group_by=["certificate", "service"],
    )
    between = {
        (name, f"lingqu-{service}")
        for name in ("mtls", "mtls-ca")
        for service in ("gateway-control", "inference", "metrics", "registry")
    }
    edge = {("public", "lingqu-gateway-control"), ("clients-ca", "lingqu-gateway-control")}
    async with tls.channel(secured.layout.address(at.METRICS), [], cli(secured)) as channel:
        stub = MetricsServiceStub(channel)

        async def told() -> bool:
            answer = await stub.Query(request, timeout=10)
            days = {
                (series.labels["certificate"], series.labels["service"]): series.samples[-1].value
                for series in answer.series
            }
            return days.keys() == between | edge and min(days.values()) > 89

        await until(told, "each part has told of its own")


async def test_requests_are_told(secured: Suite) -> None:
    request = metrics_pb2.QueryRequest(
        measurement="requests", aggregate=metrics_pb2.AGGREGATE_SUM, group_by=["model"]
    )
    async with lingqu.Client(secured.public, secured.key, ca=ca(secured)) as client:
        await client.embed("minilm-l6-v2", ["a canal"])
    async with tls.channel(secured.layout.address(at.METRICS), [], cli(secured)) as channel:
        stub = MetricsServiceStub(channel)

        async def told() -> bool:
            answer = await stub.Query(request, timeout=10)
            return any(series.labels["model"] == "minilm-l6-v2" for series in answer.series)

        await until(told, "Envoy has told of it")


async def test_a_program_without_a_certificate_has_a_port(secured: Suite) -> None:
    request = metrics_pb2.QueryRequest(
        measurement="program.ticks", aggregate=metrics_pb2.AGGREGATE_SUM, group_by=["service"]
    )
    async with AsyncExitStack() as stack:
        program = ExitStack()
        stack.push_async_callback(asyncio.to_thread, program.close)
        own = program.enter_context(metering("a-program", secured.layout.address(PLAIN), every_s=0.1))
        own.create_counter("program.ticks").add(1)
        channel = await stack.enter_async_context(
            tls.channel(secured.layout.address(at.METRICS), [], cli(secured))
        )
        stub = MetricsServiceStub(channel)

        async def told() -> bool:
            answer = await stub.Query(request, timeout=10)
            return [series.labels["service"] for series in answer.series] == ["a-program"]

        await until(told, "its figures are there")


async def test_envoy_finds_the_replicas_healthy(secured: Suite) -> None:
    """It asks them, too, with its certificate."""

    async def asked() -> bool:
        async with httpx.AsyncClient(trust_env=False) as admin:
            address = secured.layout.address(at.ENVOY_ADMIN)
            stats = (await admin.get(f"http://{address}/stats?filter=health_check")).text
        found = dict(line.split(": ") for line in stats.splitlines() if ": " in line)
        return all(
            any(
                int(n) > 0
                for name, n in found.items()
                if part in name and name.endswith("health_check.success")
            )
            for part in ("inference", "triton")
        )

    await until(asked, "both have answered")


def test_the_command_line_works(secured: Suite) -> None:
    command = [str(Path(sys.executable).parent / "lingqu"), "--state", str(secured.layout.state)]
    for words in ("status", "models list", "embed canal", "keys create alice", "metrics list"):
        arguments = words.split()
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    remote = ["--address", secured.public, "--ca", str(ca(secured)), "--key", secured.key]
    done = subprocess.run([*command, *remote, "embed", "a canal"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


async def test_a_certificate_is_as_good_as_a_key(secured: Suite) -> None:
    clients = Authority.at(secured.layout.tls, "clients")
    own = clients.issue(secured.layout.state / "alice.pem", "spiffe://example.org/alice")
    async with lingqu.Client(secured.public, ca=ca(secured), certificate=own) as client:
        answer = await client.embed("minilm-l6-v2", ["a canal"])
        assert len(answer.embeddings[0].values) == 384


@pytest.mark.parametrize(
    "port",
    [
        *(at.PUBLIC, at.GATEWAY, at.REGISTRY, at.INFERENCE, at.INFERENCE_HTTP),
        *(at.TRITON_GRPC, at.ETCD, at.METRICS, at.METRICS_HTTP),
    ],
)
async def test_no_port_answers_who_has_no_certificate(secured: Suite, port: int) -> None:
    """The public port answers clients who trust it; the parts answer each other only."""
    context = ssl.create_default_context(cafile=str(ca(secured)))

    def hello() -> bytes:
        with (
            socket.create_connection((at.HOST, secured.layout.port(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=at.HOST) as sealed,
        ):
            sealed.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            return sealed.recv(100)

    try:
        said = await asyncio.to_thread(hello)
    except (ssl.SSLError, ConnectionError):
        said = b""
    assert (said != b"") == (port == at.PUBLIC)
    async with grpc.aio.insecure_channel(secured.layout.address(port)) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)


async def test_a_new_certificate_of_the_public_port_needs_no_restart(secured: Suite) -> None:
    def presented() -> bytes:
        context = ssl.create_default_context(cafile=str(ca(secured)))
        address = (at.HOST, secured.layout.port(at.PUBLIC))
        with (
            socket.create_connection(address, timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=at.HOST) as sealed,
        ):
            return sealed.getpeercert(binary_form=True) or b""

    before = await asyncio.to_thread(presented)
    Authority.at(secured.layout.tls).issue(secured.layout.tls / "public.pem", hosts=(at.HOST, "localhost"))

    async def renewed() -> bool:
        return await asyncio.to_thread(presented) != before

    await until(renewed, "new connections get the new certificate")
