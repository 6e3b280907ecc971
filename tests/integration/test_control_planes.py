"""Control planes before real Envoys: several of them, killed, behind, without a registry, fed with poison."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.layout import PUBLIC, Layout
from services.gateway.app import ADS_SERVICE
from services.gateway.keys import KeyRing
from tests.conftest import free_offset
from tests.controls import Backend, Control, Gate, gated, until_synced
from tests.fake_registry import FakeRegistry, instance, model
from tests.waiting import pause, until


class Site:
    """A registry, backends, and control planes and Envoys as a test needs them."""

    registry: FakeRegistry

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.key = folder / "signing.pem"
        KeyRing.at(self.key)
        self.public = Layout(folder, free_offset()).address(PUBLIC)
        self._made = 0

    async def another_registry(self) -> FakeRegistry:
        made = FakeRegistry()
        await made.start()
        self._stack.push_async_callback(made.stop)
        return made

    async def control(self, registry: str = "", **env: str) -> Control:
        self._made += 1
        folder = self._folder / f"control-{self._made}"
        made = Control(folder, registry or self.registry.address, self.public, self.key, **env)
        await made.start()
        self._stack.push_async_callback(made.stop)
        return made

    async def backend(self, name: str) -> Backend:
        made = Backend(name)
        await made.start()
        self._stack.push_async_callback(made.stop)
        return made

    async def envoy(self, *controls: Control) -> Gate:
        gate = await self._stack.enter_async_context(
            gated(self._folder / "envoy", ",".join(c.address for c in controls), self.key)
        )
        gate.use(self.public)
        return gate


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        made = Site(tmp_path, stack)
        made.registry = await made.another_registry()
        yield made


async def test_envoys_go_to_another_control_plane_and_lose_nothing(site: Site) -> None:
    one, two = await site.control(), await site.control()
    first, second = await site.backend("first"), await site.backend("second")
    await site.registry.put(model("m", {1: 100}), instance("a", first.address, ("m", 1)))
    gate = await site.envoy(one, two)
    await until(lambda: gate.answered("m"), "the model answers")

    async def agreed() -> bool:
        states = [await one.described(), await two.described()]
        everybody = {c.address for c in states[0].control_planes} == {one.address, two.address}
        return everybody and states[0].version == states[1].version

    await until(agreed, "both know of each other and have the same to say")
    used, other = (one, two) if (await one.described()).data_planes else (two, one)
    stream = gate.stream("m")
    assert (await stream.read()).text == "first"
    await used.kill()
    await until_synced(other)
    await site.registry.put(model("m", {2: 100}), instance("b", second.address, ("m", 2)))

    async def switched() -> bool:
        return await gate.ask("m") == "second"

    await until(switched, "what changes comes from the other one")
    first.release.set()
    assert (await stream.read()).text == "the end"


async def test_a_control_plane_that_is_behind_changes_nothing(site: Site) -> None:
    late = await site.another_registry()
    one, two = await site.control(), await site.control(late.address)
    first, second = await site.backend("first"), await site.backend("second")
    hosts = (instance("a", first.address, ("m", 1)), instance("b", second.address, ("m", 2)))
    for registry in (site.registry, late):
        registry.revision = 500
        await registry.put(model("m", {1: 100}), *hosts)
    gate = await site.envoy(one, two)
    await until(lambda: gate.answered("m"), "the model answers")
    if not (await one.described()).data_planes:  # it came to the other one
        site.registry, late, one, two = late, site.registry, two, one
    late.hold()
    for registry in (site.registry, late):
        registry.revision = 900
        await registry.put(model("m", {2: 100}))

    async def switched() -> bool:
        return await gate.ask("m") == "second"

    await until(switched, "the new version has the traffic")
    await one.kill()

    async def arrived() -> bool:
        return any(plane.ahead for plane in (await two.described()).data_planes)

    await until(arrived, "Envoy has come to the one that is behind")
    assert {await gate.ask("m") for _ in range(20)} == {"second"}
    late.let_go()
    await until_synced(two)
    assert {await gate.ask("m") for _ in range(20)} == {"second"}


async def test_without_control_plane_backends_come_and_go_and_nothing_is_cut(site: Site) -> None:
    control = await site.control()
    backends = [await site.backend(f"b{n}") for n in range(3)]
    hosts = [instance(b.name, b.address, ("m", 1)) for b in backends[:2]]
    await site.registry.put(model("m", {1: 100}), *hosts)
    gate = await site.envoy(control)
    await until(lambda: gate.answered("m"), "the model answers")
    await until_synced(control)
    streams = [gate.stream("m") for _ in range(16)]
    held = [(await stream.read()).text for stream in streams]
    await control.kill()
    await backends[0].stop()
    await site.registry.remove("b0")
    await site.registry.put(instance("b2", backends[2].address, ("m", 1)))
    answers = Counter([await gate.ask("m") for _ in range(40)])  # none fails
    assert set(answers) == {"b1"}
    again = Control(control.layout.state, site.registry.address, site.public, site.key)
    again.take(control)
    await again.start()
    try:
        await until_synced(again)

        async def used() -> bool:
            return await gate.ask("m") == "b2"

        await until(used, "the backend that has come meanwhile is used")
        for backend in backends:
            backend.release.set()
        ends = [(await s.read()) for s, name in zip(streams, held, strict=True) if name == "b1"]
        assert ends
        assert {end.text for end in ends} == {"the end"}
    finally:
        await again.stop()


async def test_a_control_plane_that_knows_nothing_says_nothing(site: Site) -> None:
    """Not one whose registry is away, nor one whose registry has not reached etcd."""
    control = await site.control()
    backend = await site.backend("b")
    await site.registry.put(model("m", {1: 100}), instance("a", backend.address, ("m", 1)))
    ignorant = await site.another_registry()
    ignorant.knows = False
    away, unknowing = await site.control("127.0.0.1:1"), await site.control(ignorant.address)
    gate = await site.envoy(control, away, unknowing)
    await until(lambda: gate.answered("m"), "the model answers")
    await until_synced(control)
    await control.kill()

    async def moved() -> bool:
        return any([(await other.described()).data_planes for other in (away, unknowing)])

    await until(moved, "Envoy has gone to one that knows nothing")
    await pause(0.3, "whatever it would say")
    assert {await gate.ask("m") for _ in range(10)} == {"b"}
    for other in (away, unknowing):
        assert (await other.described()).version == ""
        async with grpc.aio.insecure_channel(other.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=ADS_SERVICE), timeout=5
            )
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_poisoned_record_stops_nobody_elses_changes(site: Site) -> None:
    control = await site.control()
    backend = await site.backend("b")
    await site.registry.put(model("m", {1: 100}), instance("a", backend.address, ("m", 1)))
    gate = await site.envoy(control)
    await until(lambda: gate.answered("m"), "the model answers")
    names = ("x" * 10_240, "a b", "../m", "ü", "a\x7fb", "new\nline", "<invalid>", "%REQ(x)%", "*", ".")
    places = (
        "nowhere:1",
        "1.2.3.4",
        ":",
        "1.2.3.4:0",
        "1.2.3.4:99999",
        "[::1",
        "256.1.1.1:1",
        "%:1",
        " ",
        "",
    )
    poison = zip(names, places, strict=True)
    records = [instance(f"p{n}", where, (name, 1)) for n, (name, where) in enumerate(poison)]
    records += [instance("m2", "nowhere:80", ("m", 1))]
    await site.registry.put(*(model(name, {1: 100}) for name in names), *records)
    await site.registry.put(model("new", {1: 100}), instance("c", backend.address, ("new", 1)))
    await until(lambda: gate.answered("new"), "a model that comes after it answers")
    state = await until_synced(control)
    assert not state.data_planes[0].rejections
    assert await gate.ask("m") == "b"


async def test_a_breaker_that_opens_is_described_and_routed_by(site: Site) -> None:
    class Broken(Backend):
        async def Generate(
            self, request: object, context: grpc.aio.ServicerContext[object, object]
        ) -> NoReturn:
            self.calls += 1
            await context.abort(grpc.StatusCode.INTERNAL, "broken")

    broken = Broken("broken")
    await broken.start()
    record = model("m", {1: 100})
    record.policy.protection.breaker_min_requests = 5
    await site.registry.put(record, instance("a", broken.address, ("m", 1)))
    control = await site.control()
    gate = await site.envoy(control)
    await until_synced(control)

    async def opened() -> str:
        await asyncio.gather(*(gate.answered("m") for _ in range(5)))
        breaker = (await control.described()).routes[0].breaker
        return breaker.reason if breaker.state == breaker.STATE_OPEN else ""

    assert "requests failed" in await until(opened, "the breaker opens")

    async def refused() -> bool:
        calls = broken.calls
        await gate.answered("m")
        return broken.calls == calls

    await until(refused, "nothing reaches the replica")
    await broken.stop()


async def check_outage(site: Site, seconds: float) -> None:
    """No control plane, while one backend after the other ends and comes back at its address: no call fails,
    no stream is cut, neither then nor when the control plane returns."""
    control = await site.control()
    backends = [await site.backend(f"b{n}") for n in range(3)]
    steady, *others = backends
    await site.registry.put(model("m", {1: 100}), *(instance(b.name, b.address, ("m", 1)) for b in backends))
    gate = await site.envoy(control)
    await until(lambda: gate.answered("m"), "the model answers")
    await until_synced(control)
    streams = [gate.stream("m") for _ in range(12)]
    names = [(await stream.read()).text for stream in streams]
    await control.kill()
    end, asked = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for backend in others:
            await backend.stop()
            for _ in range(20):
                await gate.ask("m")
            await backend.start(backend.address)
            for _ in range(20):
                await gate.ask("m")
            asked += 40
    again = Control(control.layout.state, site.registry.address, site.public, site.key)
    again.take(control)
    await again.start()
    try:
        await until_synced(again)
        await gate.ask("m")
        steady.release.set()
        kept = [s for s, name in zip(streams, names, strict=True) if name == steady.name]
        assert kept
        assert {(await stream.read()).text for stream in kept} == {"the end"}
        assert asked
    finally:
        await again.stop()


async def test_an_outage_of_the_control_plane(site: Site) -> None:
    await check_outage(site, 0.5)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_ten_minutes_without_control_plane(site: Site) -> None:
    await check_outage(site, 600.0)
