"""A registry whose copy of etcd is behind decides as one whose copy is not: what it refuses, finds done
already or overwrites, it judges by what etcd has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from lingqu.registry.v1 import access_pb2, instances_pb2, models_pb2
from services.core.lifecycle import SERVER_OPTIONS
from services.registry.app import RegistrySettings, running
from tests.conftest import EtcdServer, free_offset
from tests.registries import Api, refused, served, weights
from tests.waiting import pause, until

Call = Callable[[], Awaitable[Any]]
WATCH = "/etcdserverpb.Watch/Watch"


class SlowWatch(grpc.GenericRpcHandler):
    """Passes all calls on to etcd as they are, but holds back what its watches tell while `flowing` is not
    set."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel: Any = channel
        self.flowing = asyncio.Event()
        self.flowing.set()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method, metadata = details.method, details.invocation_metadata

        async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            call = self._channel.stream_stream(method)(requests, metadata=metadata)
            async for answer in call:
                if method == WATCH:
                    await self.flowing.wait()
                yield answer

        async def unary(request: bytes, context: Any) -> bytes:
            try:
                answer = self._channel.unary_unary(method)(request, metadata=metadata)
                return await answer  # type: ignore[no-any-return]
            except grpc.aio.AioRpcError as err:
                await context.abort(err.code(), err.details() or "")
                raise

        if method in (WATCH, "/etcdserverpb.Lease/LeaseKeepAlive"):
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


class Pair:
    """Two registries on one etcd: `ahead`, and `behind`, which can be kept from seeing what changes."""

    def __init__(self, ahead: Api, behind: Api, watch: SlowWatch) -> None:
        self.ahead = ahead
        self.behind = behind
        self._watch = watch

    async def level(self) -> None:
        """Wait until both know the same."""

        async def same() -> bool:
            listed = instances_pb2.ListInstancesRequest()
            both = [await api.instances.ListInstances(listed, timeout=5) for api in (self.ahead, self.behind)]
            return bool(both[0].revision == both[1].revision)

        await until(same, "both registries are at the same revision")

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        await self.level()
        self._watch.flowing.clear()
        try:
            yield
        finally:
            self._watch.flowing.set()

    async def asked_behind(self, change: Call, asked: Call) -> Any:
        """What the one behind answers to `asked` when it has not seen `change` yet."""
        async with self.held():
            await change()
            task = asyncio.ensure_future(asked())
            await pause(0.2, "it has time enough to answer from what it knows")
        return await task


@pytest.fixture
async def pair(etcd_server: EtcdServer) -> AsyncIterator[Pair]:
    address, proxied = f"127.0.0.1:{8082 + free_offset()}", f"127.0.0.1:{8082 + free_offset()}"
    async with grpc.aio.insecure_channel(etcd_server.address) as channel, served(etcd_server) as ahead:
        watch, proxy = SlowWatch(channel), grpc.aio.server(options=SERVER_OPTIONS)
        proxy.add_generic_rpc_handlers((watch,))
        proxy.add_insecure_port(proxied)
        await proxy.start()
        cfg = RegistrySettings(registry_listen=address, etcd=proxied, grace_s=0.1)
        async with running(cfg), grpc.aio.insecure_channel(address) as behind:
            yield Pair(ahead, Api(behind), watch)
        await proxy.stop(0)


@pytest.fixture
async def released(pair: Pair) -> Pair:
    """Version 1 of two has the traffic."""
    await pair.ahead.create()
    await pair.ahead.create()
    await pair.ahead.host(1, 2)
    await pair.ahead.until_stage(2, models_pb2.STAGE_READY)
    await pair.ahead.promote(1)
    return pair


async def test_nothing_to_release_is_said_of_what_etcd_has(released: Pair) -> None:
    model = await released.asked_behind(lambda: released.ahead.promote(2), lambda: released.behind.promote(1))
    assert (weights(model), model.last_release) == ({1: 100}, 3)


async def test_a_release_repeated_elsewhere_is_known(released: Pair) -> None:
    model = await released.asked_behind(
        lambda: released.ahead.promote(2, request_id="r"), lambda: released.behind.promote(2, request_id="r")
    )
    assert (weights(model), model.last_release) == ({2: 100}, 2)


async def test_a_release_on_what_was_seen_elsewhere_is_carried_out(released: Pair) -> None:
    async with released.held():
        seen = await released.ahead.promote(2)
        asked = asyncio.create_task(released.behind.promote(1, expected_revision=seen.traffic_revision))
        await pause(0.2, "it has time enough to answer from what it knows")
    assert weights(await asked) == {1: 100}


async def test_a_version_that_was_retired_elsewhere_gets_no_name(released: Pair) -> None:
    retire = models_pb2.RetireModelVersionRequest(model="m", version=2)
    name = models_pb2.SetAliasRequest(model="m", alias="next", version=2)
    error = await released.asked_behind(
        lambda: released.ahead.models.RetireModelVersion(retire, timeout=5),
        lambda: refused(released.behind.models.SetAlias(name, timeout=5)),
    )
    assert error.reason == "WRONG_STAGE"


async def test_versions_of_one_model_are_for_one_task(pair: Pair) -> None:
    error = await pair.asked_behind(pair.ahead.create, lambda: refused(pair.behind.create(task="embed")))
    assert error.field == "version.task"


async def test_a_client_is_set_and_deleted_whatever_was_seen_of_it(pair: Pair) -> None:
    async def set_client(api: Api, **fields: Any) -> int:
        request = access_pb2.SetClientRequest(client=access_pb2.Client(name="u"), **fields)
        return int((await api.access.SetClient(request, timeout=5)).client.revision)

    delete = access_pb2.DeleteClientRequest(name="u")
    first = await set_client(pair.ahead)
    second = await pair.asked_behind(
        lambda: set_client(pair.ahead, expected_revision=first), lambda: set_client(pair.behind)
    )
    async with pair.held():
        third = await set_client(pair.ahead, expected_revision=second)
        asked = asyncio.create_task(set_client(pair.behind, expected_revision=third))
        await pause(0.2, "it has time enough to answer from what it knows")
    assert await asked > third
    await pair.ahead.access.DeleteClient(delete, timeout=5)
    await pair.asked_behind(
        lambda: set_client(pair.ahead), lambda: pair.behind.access.DeleteClient(delete, timeout=5)
    )
    await pair.level()
    assert not (await pair.ahead.access.ListClients(access_pb2.ListClientsRequest(), timeout=5)).clients


async def test_a_key_is_revoked_once(pair: Pair) -> None:
    async def revoke(api: Api, reason: str) -> str:
        request = access_pb2.RevokeKeyRequest(key_id="k", reason=reason)
        return str((await api.access.RevokeKey(request, timeout=5)).key.reason)

    assert (
        await pair.asked_behind(lambda: revoke(pair.ahead, "first"), lambda: revoke(pair.behind, "second"))
        == "first"
    )


async def test_whoever_is_registered_now_is_deregistered(pair: Pair) -> None:
    await pair.ahead.host(1)
    gone = instances_pb2.DeregisterInstanceRequest(id="i1")
    await pair.asked_behind(
        lambda: pair.ahead.host(1), lambda: pair.behind.instances.DeregisterInstance(gone, timeout=5)
    )
    await pair.level()
    listed = await pair.ahead.instances.ListInstances(instances_pb2.ListInstancesRequest(), timeout=5)
    assert not listed.instances
