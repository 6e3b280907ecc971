"""Limits that Envoy enforces by itself: exact for requests in progress, buckets for rates."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import httpx2 as httpx
import pytest

from services.core.access import RATES, Access, Client, Limits, SharedLimits
from services.core.discovery import Protection, VersionKey
from tests.planes import Backend, Caller, Plane, hosting, model, plane
from tests.waiting import forever, pause, until

MODELS = [model(name, 100, protection=Protection(no_breaker=True)) for name in ("m", "n")]
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
async def gate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    async with plane(tmp_path_factory.mktemp("limits")) as made:
        yield made


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    made = Backend()
    await made.start()
    yield made
    await made.stop()


async def limited(
    gate: Plane, backend: Backend, *clients: Client, shared: tuple[SharedLimits, ...] = ()
) -> None:
    keys = [VersionKey(m.name, 1) for m in MODELS]
    await gate.show([hosting("r", backend.address, *keys)], MODELS, Access(clients, shared=shared))


async def asleep(_: object) -> None:
    await pause(0.3, "others come meanwhile")


def counted(answers: list) -> Counter[grpc.StatusCode]:  # type: ignore[type-arg]
    return Counter(answer.code for answer in answers)


async def test_a_rate_is_let_through_and_no_more(gate: Plane, backend: Backend) -> None:
    every = ("*",)
    await limited(
        gate,
        backend,
        Client("second", every, Limits(requests_per_second=5, local=RATES)),
        Client("minute", every, Limits(requests_per_minute=7, local=RATES)),
        Client("free", every),
    )
    second, minute, free = [await gate.caller(name) for name in ("second", "minute", "free")]
    assert counted(await second.ask_often("m", 12)) == {grpc.StatusCode.OK: 5, EXHAUSTED: 7}
    assert counted(await minute.ask_often("m", 12)) == {grpc.StatusCode.OK: 7, EXHAUSTED: 5}
    assert counted(await free.ask_often("m", 30)) == {grpc.StatusCode.OK: 30}
    await until(lambda: _ok(second, "m"), "the second is over", timeout_s=2)


async def _ok(caller: Caller, name: str) -> bool:
    return (await caller.ask(name)).ok


async def _refused(caller: Caller, name: str = "m") -> bool:
    return (await caller.ask(name)).code is EXHAUSTED


async def test_who_is_refused_is_told_which_limit_and_when_to_come_back(
    gate: Plane, backend: Backend
) -> None:
    await limited(gate, backend, Client("c", ("*",), Limits(requests_per_minute=6, local=RATES)))
    caller = await gate.caller("c")
    first = await caller.ask("m")
    assert (first.headers["x-ratelimit-limit"], first.headers["x-ratelimit-remaining"]) == ("6", "5")
    await caller.ask_often("m", 5)
    refused = await caller.ask("m")
    assert refused.code is EXHAUSTED
    assert refused.text == 'client "c" may make 6 requests per minute'
    info = refused.details["ErrorInfo"]
    assert (info.reason, info.domain) == ("LIMIT_REACHED", "lingqu")
    assert dict(info.metadata) == {"limit": "requests_per_minute", "of": "client"}
    assert refused.details["RetryInfo"].retry_delay.seconds == 10
    assert refused.headers["x-ratelimit-remaining"] == "0"

    async with httpx.AsyncClient(base_url=f"http://{gate.entry.listen}", trust_env=False) as client:
        client.headers["authorization"] = f"Bearer {caller.key}"
        answer = await client.post("/v1/chat/completions", json={"model": "m"})
        own = await client.post("/v1/models/m:generate", json={"prompt": "x"})
    assert (own.status_code, own.json()["message"]) == (429, 'client "c" may make 6 requests per minute')
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == own.headers["retry-after"] == "10"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"] == {
        "message": 'client "c" may make 6 requests per minute',
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }


async def test_answers_tell_of_one_rate_and_refusals_of_the_one_that_was_reached(
    gate: Plane, backend: Backend
) -> None:
    both = Limits(requests_per_second=2, requests_per_minute=60, local=RATES)
    await limited(gate, backend, Client("both", ("*",), both))
    caller = await gate.caller("both")
    passed = await caller.ask("m")
    assert (passed.headers["x-ratelimit-limit"], passed.headers["x-ratelimit-remaining"]) == ("60", "59")
    refused = next(a for a in await caller.ask_often("m", 5) if a.code is EXHAUSTED)
    assert refused.text == 'client "both" may make 2 requests per second'
    assert (refused.headers["x-ratelimit-limit"], refused.headers["x-ratelimit-remaining"]) == ("2", "0")
    assert refused.headers["x-ratelimit-reset"] == refused.headers["retry-after"] == "1"


async def test_limits_of_a_model_and_of_a_client_for_a_model(gate: Plane, backend: Backend) -> None:
    local = Limits(requests_per_minute=3, local=RATES)
    await limited(
        gate,
        backend,
        Client("c", ("*",), model_limits=(("m", local), ("*", Limits(requests_per_minute=5, local=RATES)))),
        Client("d", ("*",)),
        shared=(SharedLimits("n", Limits(requests_per_minute=8, local=RATES)),),
    )
    c, d = await gate.caller("c"), await gate.caller("d")
    assert counted([*await c.ask_often("m", 2), *await c.ask_often("m@1", 3)]) == {
        grpc.StatusCode.OK: 3,
        EXHAUSTED: 2,
    }
    assert (await c.ask("m")).details["ErrorInfo"].metadata["of"] == "client_model"
    assert counted(await d.ask_often("m", 10)) == {grpc.StatusCode.OK: 10}
    assert counted(await c.ask_often("n", 4)) == {grpc.StatusCode.OK: 4}
    assert counted(await d.ask_often("n", 6)) == {grpc.StatusCode.OK: 4, EXHAUSTED: 2}
    refused = await d.ask("n")
    assert refused.details["ErrorInfo"].metadata["of"] == "model"
    assert refused.text == 'model "n" takes 8 requests per minute'
    async with httpx.AsyncClient(base_url=f"http://{gate.entry.listen}", trust_env=False) as client:
        client.headers["authorization"] = f"Bearer {d.key}"
        answer = await client.post("/v1/chat/completions", json={"model": "n"})
    assert answer.status_code == 429, "REST and gRPC share a limit"


@pytest.mark.parametrize("of", ["client", "model", "client_model"])
async def test_requests_in_progress_are_limited_exactly(gate: Plane, backend: Backend, of: str) -> None:
    four = Limits(concurrent_requests=4)
    client = {
        "client": Client("c", ("*",), four),
        "client_model": Client("c", ("*",), model_limits=(("m", four),)),
    }.get(of, Client("c", ("*",)))
    await limited(gate, backend, client, shared=(SharedLimits("m", four),) if of == "model" else ())
    caller, backend.before = await gate.caller("c"), asleep
    for _ in range(2):
        answers = await caller.ask_often("m", 10)
        assert counted(answers) == {grpc.StatusCode.OK: 4, EXHAUSTED: 6}
        assert backend.most == 4
    refused = next(answer for answer in answers if not answer.ok)
    assert dict(refused.details["ErrorInfo"].metadata) == {"limit": "concurrent_requests", "of": of}
    assert refused.details["RetryInfo"].retry_delay.seconds == 1


async def test_nothing_that_goes_wrong_with_requests_wears_a_limit_out(gate: Plane, backend: Backend) -> None:
    """Requests by the thousand that are cancelled, time out, are refused, fail or lose their backend: then
    exactly as many as ever are let through (litellm #20256, #27955)."""
    limits = Limits(concurrent_requests=6)
    await limited(
        gate,
        backend,
        Client("c", ("*",), limits, (("m", Limits(concurrent_requests=5)),)),
        shared=(SharedLimits("m", Limits(concurrent_requests=4)),),
    )
    caller = await gate.caller("c")

    async def worn(context: object) -> None:
        if backend.asked % 3 == 0:
            await context.abort(grpc.StatusCode.INTERNAL, "no")  # type: ignore[attr-defined]
        if backend.asked % 3 == 1:
            await forever()

    backend.before = worn
    for _ in range(45):
        calls = [caller.call("m", timeout_s=0.02 if n % 2 else 10) for n in range(40)]
        await pause(0.01, "some have reached the backend, some have not")
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*(call.code() for call in calls))
    port = int(backend.address.rpartition(":")[2])
    hung = [caller.call("m") for _ in range(8)]
    await until(lambda: backend.busy, "some have reached the backend")
    await backend.stop()
    await asyncio.gather(*(call.code() for call in hung))
    backend.before = asleep
    await backend.start(port)
    await until(lambda: _ok(caller, "m"), "the backend is reached again")
    for _ in range(2):
        assert counted(await caller.ask_often("m", 12)) == {grpc.StatusCode.OK: 4, EXHAUSTED: 8}


async def test_limits_change_under_load_and_routes_change_without_them(gate: Plane, backend: Backend) -> None:
    def client(number: int) -> Client:
        return Client("c", ("*",), Limits(requests_per_minute=number, local=RATES))

    await limited(gate, backend, client(10))
    caller = await gate.caller("c")
    assert counted(await caller.ask_often("m", 20))[grpc.StatusCode.OK] == 10
    # Another client's allow-list, replicas that come and go: no count begins anew.
    keys = [VersionKey("m", 1)]
    replicas = [hosting("r", backend.address, *keys), hosting("s", backend.address, *keys)]
    await gate.show(replicas, MODELS, Access((client(10), Client("e", ("m",)))))
    assert counted(await caller.ask_often("m", 5)) == {EXHAUSTED: 5}

    codes: Counter[grpc.StatusCode] = Counter()

    async def load() -> None:
        while True:
            codes.update(counted(await caller.ask_often("m", 5)))

    loading = asyncio.ensure_future(load())
    for number in (1, 300, 2, 40):
        await limited(gate, backend, client(number))
        await until(lambda: _refused(caller), f"{number} are used up")
    loading.cancel()
    assert set(codes) == {grpc.StatusCode.OK, EXHAUSTED}
    assert codes[grpc.StatusCode.OK] <= 1 + 300 + 2 + 40 + 10
    await limited(gate, backend)
    assert counted(await caller.ask_often("m", 20)) == {grpc.StatusCode.OK: 20}


async def test_how_urgent_a_client_may_be_is_told_to_inference(gate: Plane, backend: Backend) -> None:
    await limited(gate, backend, Client("c", ("*",), max_priority=3), Client("d", ("*",)))
    for name, most in (("c", "3"), ("d", None)):
        caller = await gate.caller(name)
        call = caller.call("m", metadata=(("x-lingqu-max-priority", "1"), ("x-lingqu-fallback", "n")))
        assert (await call).text == backend.address
        assert backend.headers.get("x-lingqu-max-priority") == most
        assert "x-lingqu-fallback" not in backend.headers


async def test_what_is_in_progress_outlives_a_change_of_its_limit(gate: Plane, backend: Backend) -> None:
    """It is not counted by the new one, which admits exactly as many beside it."""
    go = asyncio.Event()

    async def wait(_: object) -> None:
        await go.wait()

    backend.before = wait

    def client(number: int) -> Client:
        return Client("c", ("*",), Limits(concurrent_requests=number))

    await limited(gate, backend, client(3))
    caller = await gate.caller("c")
    first = [asyncio.ensure_future(caller.ask("m")) for _ in range(5)]
    await until(lambda: backend.busy == 3, "three are in progress")
    await limited(gate, backend, client(2))
    second = [asyncio.ensure_future(caller.ask("m")) for _ in range(5)]
    await until(lambda: backend.busy == 5, "two more are")
    go.set()
    assert counted(await asyncio.gather(*first)) == {grpc.StatusCode.OK: 3, EXHAUSTED: 2}
    assert counted(await asyncio.gather(*second)) == {grpc.StatusCode.OK: 2, EXHAUSTED: 3}
    backend.before = asleep
    assert counted(await caller.ask_often("m", 6)) == {grpc.StatusCode.OK: 2, EXHAUSTED: 4}
