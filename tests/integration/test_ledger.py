"""The ledger of limits on a real etcd: one owner a shard, and nothing late is ever written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import ledger_pb2 as pb
from lingqu.registry.v1.ledger_pb2_grpc import LedgerServiceStub
from services.registry.app import RegistrySettings, running
from tests.conftest import EtcdServer, free_offset
from tests.registries import refused
from tests.waiting import pause, until

ADDRESS = "127.0.0.1:1"


@pytest.fixture
async def ledger(etcd_server: EtcdServer) -> AsyncIterator[Any]:
    address = f"127.0.0.1:{8082 + free_offset()}"
    cfg = RegistrySettings(registry_listen=address, etcd=etcd_server.address, grace_s=0.1)
    async with running(cfg), grpc.aio.insecure_channel(address) as channel:
        yield LedgerServiceStub(channel)


async def opened(ledger: Any, ttl_s: int = 10) -> int:
    request = pb.OpenSessionRequest(address=ADDRESS, ttl=Duration(seconds=ttl_s))
    return int((await ledger.OpenSession(request, timeout=5)).session_id)


async def taken(ledger: Any, session: int, shard: int = 3) -> tuple[int, dict[str, bytes]]:
    request = pb.TakeShardRequest(session_id=session, shard=shard, address=ADDRESS)
    answer = await ledger.TakeShard(request, timeout=5)
    return answer.fence, {entry.name: entry.value for entry in answer.entries}


def write(fence: int, shard: int = 3, forget: tuple[str, ...] = (), **entries: bytes) -> pb.ShardWrite:
    found = [pb.LedgerEntry(name=n, value=v, ttl=Duration(seconds=60)) for n, v in entries.items()]
    return pb.ShardWrite(shard=shard, fence=fence, entries=found, forget=forget)


async def written(ledger: Any, *writes: pb.ShardWrite) -> int:
    return int((await ledger.WriteLedger(pb.WriteLedgerRequest(writes=writes), timeout=5)).fence)


async def test_a_shard_has_one_owner_and_the_next_one_reads_all_that_was_written(ledger: Any) -> None:
    first, second = await opened(ledger), await opened(ledger)
    fence, entries = await taken(ledger, first)
    assert entries == {}
    assert (await refused(taken(ledger, second))).code == grpc.StatusCode.ALREADY_EXISTS
    fence = await written(ledger, write(fence, a=b"1", b=b"2"))
    fence = await written(ledger, write(fence, forget=("b",), c=b"3"))
    release = pb.ReleaseShardRequest(write=write(fence, d=b"4"))
    await ledger.ReleaseShard(release, timeout=5)
    assert (await taken(ledger, second))[1] == {"a": b"1", "c": b"3", "d": b"4"}
    await ledger.CloseSession(pb.CloseSessionRequest(session_id=second), timeout=5)
    await taken(ledger, first)


async def test_nothing_late_is_written(ledger: Any) -> None:
    """Neither of a former owner, nor an earlier write of this one, nor after the shard was taken again."""
    first = await opened(ledger)
    old, _ = await taken(ledger, first)
    now = await written(ledger, write(old, a=b"1"))
    assert (await refused(written(ledger, write(old, a=b"late")))).code == grpc.StatusCode.ABORTED
    again, entries = await taken(ledger, first)
    assert entries == {"a": b"1"}
    assert (await refused(written(ledger, write(now, a=b"late")))).code == grpc.StatusCode.ABORTED
    await ledger.CloseSession(pb.CloseSessionRequest(session_id=first), timeout=5)
    _, entries = await taken(ledger, await opened(ledger))
    assert entries == {"a": b"1"}
    assert (await refused(written(ledger, write(again, a=b"late")))).code == grpc.StatusCode.ABORTED


async def test_writes_of_several_shards_are_all_or_nothing(ledger: Any) -> None:
    session = await opened(ledger)
    one, _ = await taken(ledger, session, 1)
    two, _ = await taken(ledger, session, 2)
    wrong = written(ledger, write(one, 1, a=b"1"), write(two - 1, 2, a=b"1"))
    assert (await refused(wrong)).code == grpc.StatusCode.ABORTED
    fence = await written(ledger, write(one, 1, a=b"1"), write(two, 2, a=b"2"))
    assert fence > max(one, two)
    assert [(await taken(ledger, session, n))[1] for n in (1, 2)] == [{"a": b"1"}, {"a": b"2"}]


async def test_a_session_that_is_not_renewed_frees_its_shards_and_watchers_see_it(ledger: Any) -> None:
    watch = ledger.WatchShards(pb.WatchShardsRequest(), timeout=30)
    assert (await watch.read()).snapshot
    kept, lost = await opened(ledger, 2), await opened(ledger, 2)
    await taken(ledger, kept, 1)
    await taken(ledger, lost, 2)

    async def renewed() -> None:
        while True:
            answer = await ledger.RenewSession(pb.RenewSessionRequest(session_id=kept), timeout=5)
            assert answer.ttl.seconds >= 2
            await pause(0.3, "often enough for two seconds")

    renewing = asyncio.create_task(renewed())
    sessions, owners, ended, freed = set(), set(), [], []
    while not (ended and freed):
        update = await watch.read()
        sessions |= {session.session_id for session in update.sessions}
        owners |= {(owner.shard, owner.session_id, owner.address) for owner in update.owners}
        ended += update.ended_sessions
        freed += update.freed_shards
    assert sessions == {kept, lost}
    assert owners == {(1, kept, ADDRESS), (2, lost, ADDRESS)}
    assert (ended, freed) == ([lost], [2])
    renewing.cancel()
    error = await refused(ledger.RenewSession(pb.RenewSessionRequest(session_id=lost), timeout=5))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "LEASE_EXPIRED")


async def test_who_leaves_is_told_to_all_and_keeps_its_shards_until_it_releases_them(ledger: Any) -> None:
    session = await opened(ledger)
    fence, _ = await taken(ledger, session, 5)
    watch = ledger.WatchShards(pb.WatchShardsRequest(), timeout=30)
    assert list((await watch.read()).leaving_sessions) == []
    await ledger.LeaveSession(pb.LeaveSessionRequest(session_id=session), timeout=5)
    assert list((await watch.read()).leaving_sessions) == [session]
    late = ledger.WatchShards(pb.WatchShardsRequest(), timeout=30)
    assert list((await late.read()).leaving_sessions) == [session]
    assert await written(ledger, write(fence, 5, a=b"1")) > fence
    await ledger.CloseSession(pb.CloseSessionRequest(session_id=session), timeout=5)
    while not (update := await watch.read()).ended_sessions:
        pass
    assert list(update.ended_sessions) == [session]
    assert list(update.leaving_sessions) == []
    error = await refused(ledger.LeaveSession(pb.LeaveSessionRequest(session_id=session), timeout=5))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "LEASE_EXPIRED")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.OpenSessionRequest(address="host:1", ttl=Duration(seconds=5)), "address"),
        (pb.OpenSessionRequest(address=ADDRESS, ttl=Duration(seconds=1)), "ttl.seconds"),
        (pb.TakeShardRequest(session_id=1, shard=1024, address=ADDRESS), "shard"),
        (pb.TakeShardRequest(shard=1, address=ADDRESS), "session_id"),
        (pb.WriteLedgerRequest(writes=[write(1, forget=("../x",))]), "entries.name"),
    ],
)
async def test_what_is_wrong_is_refused_by_field(ledger: Any, request_: Any, field: str) -> None:
    method = getattr(ledger, type(request_).__name__.removesuffix("Request"))
    error = await refused(method(request_, timeout=5))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_entries_expire_by_themselves(ledger: Any) -> None:
    session = await opened(ledger)
    fence, _ = await taken(ledger, session)
    entry = pb.LedgerEntry(name="a", value=b"1", ttl=Duration(seconds=2))
    await written(ledger, pb.ShardWrite(shard=3, fence=fence, entries=[entry]))

    async def gone() -> bool:
        return (await taken(ledger, session))[1] == {}

    assert not await gone()
    await until(gone, "the entry has expired")
