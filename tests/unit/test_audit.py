"""The audit log: what is written, what is not, and how much."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from lingqu.gateway.v1 import gateway_pb2 as pb
from lingqu.gateway.v1.gateway_pb2_grpc import (
    GatewayServiceServicer,
    GatewayServiceStub,
    add_GatewayServiceServicer_to_server,
)
from services.core.audit import AuditLog, audited, note
from services.core.errors import PermissionDenied, Unauthenticated
from services.core.identity import Caller
from services.core.interceptors import server_stack
from services.core.telemetry import tracing


class Service(GatewayServiceServicer):
    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        note(key_id="made")
        if request.client == "eve":
            raise PermissionDenied("no")
        return pb.CreateKeyResponse(key="the.secret.itself", key_id="made")

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        return pb.ListKeysResponse()

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        raise ZeroDivisionError


def who(metadata: Iterable[tuple[str, Any]]) -> Caller:
    if dict(metadata).get("authorization") != "Bearer good":
        raise Unauthenticated("who are you?")
    return Caller("root", admin=True, key_id="k7")


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    async with served(tmp_path / "audit.jsonl") as made:
        yield made


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[Any]:
    with tracing("test", "") as tracer:
        server = grpc.aio.server(interceptors=server_stack(tracer, 10, *audited(path, who)))
        add_GatewayServiceServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield GatewayServiceStub(channel)
        await server.stop(0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


KEY = (("authorization", "Bearer good"),)


async def test_an_act_says_who_what_and_how_it_ended(stub: Any, tmp_path: Path) -> None:
    request = pb.CreateKeyRequest(client="alice", admin=True, models=["m*"])
    await stub.CreateKey(request, metadata=KEY, timeout=5)
    (line,) = lines(tmp_path / "audit.jsonl")
    assert line["service"] == "lingqu.gateway.v1.GatewayService"
    assert line["method"] == "CreateKey"
    assert (line["client"], line["key_id"]) == ("root", "k7")
    assert line["request"] == {"client": "alice", "admin": True, "models": ["m*"]}
    assert (line["outcome"], line["reason"]) == ("OK", "")
    assert line["made_key_id"] == "made"
    assert line["peer"].startswith("ipv4:127.0.0.1")
    assert line["time"].endswith("Z")
    assert line["took_ms"] >= 0
    text = (tmp_path / "audit.jsonl").read_text()
    assert "secret" not in text
    assert "Bearer" not in text
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


async def test_refusals_and_failures_are_acts_too(stub: Any, tmp_path: Path) -> None:
    for call, request, metadata in (
        (stub.CreateKey, pb.CreateKeyRequest(client="eve"), KEY),
        (stub.CreateKey, pb.CreateKeyRequest(client="alice"), ()),
        (stub.RevokeKey, pb.RevokeKeyRequest(key_id="x"), KEY),
    ):
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call(request, metadata=metadata, timeout=5)
    found = lines(tmp_path / "audit.jsonl")
    assert [(line["client"], line["outcome"], line["reason"]) for line in found] == [
        ("root", "PERMISSION_DENIED", "PERMISSION_DENIED"),
        ("", "OK", ""),
        ("root", "INTERNAL", ""),
    ]


async def test_what_only_reads_is_no_act(stub: Any, tmp_path: Path) -> None:
    await stub.ListKeys(pb.ListKeysRequest(), metadata=KEY, timeout=5)
    assert lines(tmp_path / "audit.jsonl") == []


async def test_a_huge_request_is_cut_off(stub: Any, tmp_path: Path) -> None:
    await stub.CreateKey(pb.CreateKeyRequest(client="a" * 100_000), metadata=KEY, timeout=5)
    assert (tmp_path / "audit.jsonl").stat().st_size < 6_000
    assert lines(tmp_path / "audit.jsonl")[0]["request"].startswith('{"client": "aaa')


def test_the_files_are_bounded_and_lose_only_the_oldest(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=1_000, files=3)
    for number in range(200):
        log.write({"number": number})
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 1_000 for file in files)
    kept = [line["number"] for file in reversed(files) for line in lines(file)]
    assert kept == list(range(200 - len(kept), 200))
    assert len(kept) > 100


def test_a_line_that_cannot_be_written_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path / "audit" / "audit.jsonl")
    (tmp_path / "audit" / "audit.jsonl").unlink()
    (tmp_path / "audit").rmdir()
    log.write({"what": "this"})
    assert '{"what":"this"}' in caplog.text


def test_a_place_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        audited(tmp_path / "file" / "audit.jsonl", who)
