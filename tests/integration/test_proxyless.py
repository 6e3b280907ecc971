"""gRPC's own xDS in a client: replicas, shares and health from the control plane, without Envoy."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from envoy.service.discovery.v3 import discovery_pb2

from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.proxyless import Catalogue
from services.gateway.resources import Parser
from services.gateway.sotw import ClientStream
from services.gateway.view import view
from tests.controls import Backend, Control
from tests.fake_registry import FakeRegistry, instance, model
from tests.waiting import until

SERVICE = "lingqu.inference.v1.InferenceService"


class Client:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, calls: int = 20, version: str = "") -> dict[str, int]:
        """How often each backend answered."""
        assert self._process.stdin
        assert self._process.stdout
        line = json.dumps({"model": "m", "calls": calls, "version": version})
        self._process.stdin.write(f"{line}\n".encode())
        async with asyncio.timeout(60):
            return json.loads(await self._process.stdout.readline())  # type: ignore[no-any-return]


@asynccontextmanager
async def client(control: str, folder: Path) -> AsyncIterator[Client]:
    bootstrap = folder / "xds.json"
    server = {"server_uri": control, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}
    bootstrap.write_text(json.dumps({"xds_servers": [server], "node": {"id": "client"}}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.xds_client", f"xds:///{SERVICE}/m",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(bootstrap)},
    )  # fmt: skip
    try:
        yield Client(process)
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


async def test_a_client_follows_replicas_shares_and_versions(stack: AsyncExitStack, tmp_path: Path) -> None:
    registry = FakeRegistry()
    await registry.start()
    stack.push_async_callback(registry.stop)
    backends = [Backend(name) for name in ("one", "two", "three")]
    for backend in backends:
        await backend.start()
        stack.push_async_callback(backend.stop)
    one, two, three = backends
    await registry.put(model("m", {1: 100}), instance("a", one.address, ("m", 1)))
    control = Control(tmp_path, registry.address, "127.0.0.1:1", tmp_path / "signing.pem")
    await control.start()
    stack.push_async_callback(control.stop)
    caller = await stack.enter_async_context(client(control.address, tmp_path))
    assert await caller.ask() == {"one": 20}

    await registry.put(instance("b", two.address, ("m", 1)))

    async def both() -> bool:
        return set(await caller.ask()) == {"one", "two"}

    await until(both, "a replica that has come is used")
    await registry.remove("a")

    async def only_two() -> bool:
        return await caller.ask() == {"two": 20}

    await until(only_two, "one that has gone is not used any more")

    await registry.put(model("m", {1: 75, 2: 25}), instance("c", three.address, ("m", 2)))

    async def split() -> bool:
        return set(await caller.ask()) == {"two", "three"}

    await until(split, "the second version gets its share")
    counted = await caller.ask(600)
    expected = {"two": 450, "three": 150}
    chi2 = sum((counted[name] - wanted) ** 2 / wanted for name, wanted in expected.items())
    assert chi2 < 15.1  # one degree of freedom, p = 0.0001
    assert await caller.ask(version="2") == {"three": 20}
    assert await caller.ask(version="1") == {"two": 20}

    await control.kill()
    assert set(await caller.ask(100)) == {"two", "three"}  # it goes on with what it knows
    await control.start()
    await registry.put(model("m", {2: 100}))

    async def released() -> bool:
        return await caller.ask() == {"three": 20}

    await until(released, "what changes after that reaches it", timeout_s=30)


def catalogue(
    shares: tuple[tuple[int, int], ...] = ((1, 100),), unhealthy: tuple[str, ...] = ()
) -> Catalogue:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "generate", "x") for n in (1, 2))
    hosted = tuple(Hosted(v.key, READY) for v in versions)
    replicas = [
        Replica(f"r{n}", "inference", {"grpc": f"10.0.0.{n}:1"}, hosted, {"zone": zone})
        for n, zone in enumerate(("a", "b", "b", ""), 1)
    ]
    return Catalogue(view(replicas, [Model("m", versions, shares)], unhealthy=unhealthy), Parser())


def asked(kind: str, *names: str, **fields: Any) -> Any:
    return discovery_pb2.DiscoveryRequest(type_url=kind, resource_names=names, **fields)


def test_each_answer_has_all_that_was_asked_for_and_is_given_once() -> None:
    stream = ClientStream()
    names = [f"{SERVICE}/m/1", f"{SERVICE}/m/2"]
    stream.on_request(asked(xds.CLUSTER, *names))
    (first,) = stream.responses(catalogue())
    assert len(first.resources) == 2
    stream.on_request(asked(xds.CLUSTER, *names, response_nonce=first.nonce, version_info=first.version_info))
    assert stream.responses(catalogue()) == []
    stream.on_request(asked(xds.CLUSTER, names[0], response_nonce=first.nonce))
    (second,) = stream.responses(catalogue())
    assert len(second.resources) == 1
    stream.on_request(
        asked(xds.CLUSTER, *names, response_nonce=first.nonce)
    )  # late: it has not seen the second
    assert stream.responses(catalogue()) == []


def test_what_a_client_refuses_is_not_sent_again_until_it_has_changed() -> None:
    stream = ClientStream()
    name = f"{SERVICE}/m"
    stream.on_request(asked(xds.ROUTES, name))
    (first,) = stream.responses(catalogue())
    refusal = asked(xds.ROUTES, name, response_nonce=first.nonce)
    refusal.error_detail.message = "no"
    stream.on_request(refusal)
    assert stream.responses(catalogue()) == []
    assert len(stream.responses(catalogue(((1, 50), (2, 50))))) == 1


def test_replicas_by_zone_and_health() -> None:
    made = catalogue(unhealthy=("10.0.0.2:1",)).resource(xds.ENDPOINTS, f"{SERVICE}/m/1")
    assert made is not None
    message: Any = made.message
    found = [(e.locality.zone, e.load_balancing_weight.value, len(e.lb_endpoints)) for e in message.endpoints]
    assert found == [("any", 1, 1), ("a", 1, 1), ("b", 2, 2)]
    states = {
        m.endpoint.address.socket_address.address: m.health_status
        for e in message.endpoints
        for m in e.lb_endpoints
    }
    assert states["10.0.0.2"] == 2  # UNHEALTHY
    assert states["10.0.0.1"] == 0


def test_what_is_there_is_made() -> None:
    names = {xds.LISTENER: "m", xds.ROUTES: "m", xds.CLUSTER: "m/1", xds.ENDPOINTS: "m/2"}
    for kind, name in names.items():
        assert catalogue().resource(kind, f"{SERVICE}/{name}") is not None


@pytest.mark.parametrize("name", ["", "m", "x/m", f"{SERVICE}/nobody", f"{SERVICE}/m/7", "a" * 10_000])
def test_what_is_not_there_is_not_made_up(name: str) -> None:
    kinds = (xds.LISTENER, xds.ROUTES, xds.CLUSTER, xds.ENDPOINTS, xds.EXTENSIONS)
    assert [kind for kind in kinds if catalogue().resource(kind, name)] == []
