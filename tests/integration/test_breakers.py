"""Breakers with a real Envoy that reports what became of requests: they open, refuse at once, and close again
by themselves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import httpx2 as httpx
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tritonclient.grpc import service_pb2 as oip

from services.core.access import Access, Client
from services.core.discovery import Protection, VersionKey
from services.gateway import breakers
from services.gateway.breakers import Phase
from services.gateway.figures import REQUESTS, Figures
from tests.gates import INFER, RestBackend
from tests.planes import Backend, Caller, Plane, hosting, model, plane
from tests.waiting import forever, pause, until

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
ONE, TWO = VersionKey("m", 1), VersionKey("m", 2)


@pytest.fixture(scope="module")
def figures() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture(scope="module")
async def gate(
    tmp_path_factory: pytest.TempPathFactory, figures: InMemoryMetricReader
) -> AsyncIterator[Plane]:
    meter = MeterProvider([figures]).get_meter("test")
    async with plane(tmp_path_factory.mktemp("breakers"), Figures(meter)) as made:
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "HOLD_S", 0.5)


@pytest.fixture
async def backends() -> AsyncIterator[list[Backend]]:
    made = [Backend(), Backend()]
    for backend in made:
        await backend.start()
    yield made
    for backend in made:
        await backend.stop()


async def fail(context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "broken")


def phase(gate: Plane, version: int = 1) -> Phase:
    return gate.judge.breakers.of("m", version).phase


async def opens(gate: Plane, caller: Caller, version: int = 1) -> None:
    async def asked() -> bool:
        await caller.ask_often("m", 30)
        return phase(gate, version) is Phase.OPEN

    await until(asked, "the breaker opens")


async def test_it_opens_refuses_at_once_and_closes_by_itself(gate: Plane, backends: list[Backend]) -> None:
    await gate.show([hosting("r", backends[0].address, ONE)], [model("m", 100)])
    caller = await gate.caller("c")
    backends[0].before = fail
    await opens(gate, caller)
    refused = await until(lambda: _refused(caller), "requests are refused")
    assert refused.code is UNAVAILABLE
    assert refused.details["ErrorInfo"].reason == "BREAKER_OPEN"
    assert refused.details["RetryInfo"].retry_delay.seconds == 2
    asked, began = backends[0].asked, time.monotonic()
    answers = await caller.ask_often("m", 100)
    took = time.monotonic() - began
    if phase(gate) is Phase.OPEN:
        assert {answer.details["ErrorInfo"].reason for answer in answers} == {"BREAKER_OPEN"}
        assert backends[0].asked == asked
        assert took < 1
    async with httpx.AsyncClient(base_url=f"http://{gate.entry.listen}", trust_env=False) as client:
        client.headers["authorization"] = f"Bearer {caller.key}"
        rest = await client.post("/v1/chat/completions", json={"model": "m"})
    assert rest.status_code == 503
    assert rest.headers["retry-after"] == "2"
    assert rest.json()["error"]["type"] == "api_error"

    backends[0].before = None
    await until(lambda: _all_ok(caller), "it closes when requests succeed")
    assert phase(gate) is Phase.CLOSED


async def _refused(caller: Caller):  # type: ignore[no-untyped-def]
    """Those that are let through to try may hang as well, and be told by others that they took too long."""
    answer = await caller.ask("m", timeout_s=0.5)
    told = answer.details.get("ErrorInfo")
    return answer if told is not None and told.reason == "BREAKER_OPEN" else None


async def _all_ok(caller: Caller) -> bool:
    return all(answer.ok for answer in await caller.ask_often("m", 20))


async def test_a_bad_version_leaves_its_share_to_the_good_one(gate: Plane, backends: list[Backend]) -> None:
    replicas = [hosting("r1", backends[0].address, ONE), hosting("r2", backends[1].address, TWO)]
    await gate.show(replicas, [model("m", 50, 50)])
    caller = await gate.caller("c")
    backends[1].before = fail
    await opens(gate, caller, version=2)
    await until(lambda: _all_ok(caller), "all requests go to the other version", every_s=0.01)
    assert phase(gate, 1) is Phase.CLOSED
    backends[1].before = None

    async def shared() -> bool:
        texts = Counter(answer.text for answer in await caller.ask_often("m", 40))
        return min(texts[backend.address] for backend in backends) > 5

    await until(shared, "the version has its share again")


async def test_it_opens_when_requests_hang(gate: Plane, backends: list[Backend]) -> None:
    async def hang(_: object) -> None:
        await forever()

    protection = Protection(min_requests=10, latency_s=0.3)
    await gate.show([hosting("r", backends[0].address, ONE)], [model("m", 100, protection=protection)])
    caller = await gate.caller("c")
    backends[0].before = hang
    hung = [asyncio.ensure_future(caller.ask("m", timeout_s=20)) for _ in range(20)]
    await until(lambda: phase(gate) is Phase.OPEN, "the breaker opens")
    await until(lambda: _refused(caller), "further requests are refused")
    assert "on the average" in gate.judge.breakers.of("m", 1).reason
    for call in hung:
        call.cancel()


async def test_other_replicas_are_tried_at_once(gate: Plane, backends: list[Backend]) -> None:
    await gate.show([hosting("r", backends[0].address, ONE)], [model("m", 100)])
    caller = await gate.caller("c")
    backends[0].before = fail
    await opens(gate, caller)
    await gate.show([hosting("s", backends[1].address, ONE)], [model("m", 100)])
    assert {answer.code for answer in await caller.ask_often("m", 20)} == {OK}


async def test_a_version_has_no_more_in_progress_than_it_may(gate: Plane, backends: list[Backend]) -> None:
    """A flood is refused at once, told when to come back, and does not harm those who got in."""

    async def work(_: object) -> None:
        await pause(0.3, "all others come meanwhile")

    backends[0].before = work
    protection = Protection(max_requests=8)
    await gate.show([hosting("r", backends[0].address, ONE)], [model("m", 100, protection=protection)])
    caller = await gate.caller("c")
    answers = await caller.ask_often("m", 200)
    codes = Counter(answer.code for answer in answers)
    assert set(codes) == {OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes[OK] >= 8
    assert backends[0].most <= 8
    refused = next(answer for answer in answers if not answer.ok)
    assert refused.details["ErrorInfo"].reason == "QUEUE_FULL"
    assert refused.details["RetryInfo"].retry_delay.seconds == 1


@pytest.mark.parametrize("away", [False, True])
async def test_another_model_answers_when_all_else_is_open(
    gate: Plane, backends: list[Backend], away: bool
) -> None:
    """Whether replicas fail or there are none: the answer says which model it is of."""
    spare = hosting("s", backends[1].address, VersionKey("spare", 1))
    models = [model("m", 100, protection=Protection(fallback="spare")), model("spare", 100)]
    replicas = [hosting("r", backends[0].address, ONE), spare]
    await gate.show(replicas, models)
    caller = await gate.caller("c")
    first = await caller.ask("m")
    assert first.text == backends[0].address
    assert "x-lingqu-fallback" not in first.headers
    assert "x-lingqu-fallback" not in backends[0].headers
    if away:
        await gate.show([spare], models)
    else:
        backends[0].before = fail
        await opens(gate, caller)

    async def other() -> bool:
        answer = await caller.ask("m")
        return answer.ok and answer.headers.get("x-lingqu-fallback") == "spare"

    await until(other, "the other model answers")
    told = backends[1].headers
    assert (told["x-lingqu-fallback"], told["x-lingqu-model-version"]) == ("spare", "1")
    if away:
        backends[1].before = fail
        assert (await caller.ask("m")).code is grpc.StatusCode.INTERNAL
        await gate.show([], models)
        assert (await caller.ask("m")).details["ErrorInfo"].reason == "BACKEND_UNAVAILABLE"


async def test_nobody_reaches_by_fallback_what_it_may_not_call(gate: Plane, backends: list[Backend]) -> None:
    spare = hosting("s", backends[1].address, VersionKey("spare", 1))
    models = [model("m", 100, protection=Protection(fallback="spare")), model("spare", 100)]

    async def answers(*clients: Client) -> dict[str, str]:
        """By who asks: who answered, or why nobody did."""
        await gate.show([spare], models, Access(clients))
        callers = {name: await gate.caller(name) for name in ("all", "one", "stranger")}
        for name, patterns in (("key for one", ("m",)), ("key for both", ("m", "s*e"))):
            callers[name] = Caller(gate.entry.listen, gate.keys.mint("all", models=patterns).key)
            gate.stack.push_async_callback(callers[name].channel.close)
        found = {}
        for name, caller in callers.items():
            answer = await caller.ask("m")
            found[name] = answer.headers["x-lingqu-fallback"] if answer.ok else answer.code.name
            if not answer.ok:
                assert answer.details["ErrorInfo"].reason == "BACKEND_UNAVAILABLE"
                assert answer.details["RetryInfo"].retry_delay.seconds == 1
                assert "x-lingqu-fallback" not in answer.headers
        return found

    everything, one = Client("all", ("*",)), Client("one", ("m",))
    allowed = dict.fromkeys(("all", "stranger", "key for both"), "spare")
    found = await answers(everything, one)
    assert found == {**allowed, "one": "UNAVAILABLE", "key for one": "UNAVAILABLE"}
    assert backends[1].asked == 3
    found = await answers(everything, replace(one, models=("m", "sp*")))
    assert found == {**allowed, "one": "spare", "key for one": "UNAVAILABLE"}


async def test_over_rest_too_nobody_reaches_by_fallback_what_it_may_not_call(
    gate: Plane, backends: list[Backend]
) -> None:
    """By OpenAI's paths and by our own, each in its own form."""
    rest = RestBackend()
    async with rest.serving() as http:
        spare = hosting("s", backends[1].address, VersionKey("spare", 1), http=http)
        models = [model("m", 100, protection=Protection(fallback="spare")), model("spare", 100)]
        await gate.show([spare], models, Access((Client("all", ("*",)), Client("one", ("m",)))))
        keys = {name: gate.keys.mint(name).key for name in ("all", "one")}
        keys["key for one"] = gate.keys.mint("all", models=("m",)).key
        async with httpx.AsyncClient(base_url=f"http://{gate.entry.listen}", trust_env=False) as client:

            async def asked(name: str, path: str) -> httpx.Response:
                headers = {"authorization": f"Bearer {keys[name]}"}
                return await client.post(path, json={"model": "m", "prompt": "x"}, headers=headers)

            for path in ("/v1/completions", "/v1/models/m:generate"):
                allowed = await asked("all", path)
                assert (allowed.status_code, allowed.headers["x-lingqu-fallback"]) == (200, "spare")
                reached = len(rest.calls), backends[1].asked
                for name in ("one", "key for one"):
                    refused = await asked(name, path)
                    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                    assert "x-lingqu-fallback" not in refused.headers
                    body = refused.json()
                    if path == "/v1/completions":
                        assert body["error"]["code"] == "backend_unavailable"
                    else:
                        assert body["code"] == UNAVAILABLE.value[0]
                        assert body["details"][0]["reason"] == "BACKEND_UNAVAILABLE"
                assert (len(rest.calls), backends[1].asked) == reached
    assert [call.headers["x-lingqu-fallback"] for call in rest.calls] == ["spare"]


async def test_tensors_fall_back_to_another_version_and_never_to_another_model(
    gate: Plane, backends: list[Backend]
) -> None:
    """Another version has the same inputs and outputs; what another model has, nobody here knows."""
    spare = hosting("s", backends[1].address, VersionKey("spare", 1))
    one, two = hosting("r1", backends[0].address, ONE), hosting("r2", backends[1].address, TWO)
    models = [model("m", 50, 50, protection=Protection(fallback="spare")), model("spare", 100)]
    await gate.show([one, two, spare], models)
    caller = await gate.caller("c")
    infer = caller.channel.unary_unary(INFER)
    request = oip.ModelInferRequest(model_name="m").SerializeToString()
    metadata = (("authorization", f"Bearer {caller.key}"),)

    async def asked(times: int) -> list[object]:
        calls = (infer(request, metadata=metadata, timeout=10) for _ in range(times))
        return await asyncio.gather(*calls, return_exceptions=True)

    async def opened() -> bool:
        await asked(30)
        return phase(gate, 2) is Phase.OPEN

    async def settled() -> bool:
        return not any(isinstance(answer, Exception) for answer in await asked(20))

    backends[1].before = fail
    await until(opened, "the breaker of the second version opens")
    await until(settled, "all go to the first version", every_s=0.01)

    await gate.show([spare], models)
    backends[1].before, reached = None, backends[1].asked
    (refused,) = await asked(1)
    assert isinstance(refused, grpc.aio.AioRpcError)
    assert refused.code() is UNAVAILABLE
    assert backends[1].asked == reached
    assert (await caller.ask("m")).headers["x-lingqu-fallback"] == "spare"


async def test_every_request_to_a_replica_is_counted(
    gate: Plane, backends: list[Backend], figures: InMemoryMetricReader
) -> None:
    replica = hosting("r", backends[0].address, VersionKey("first", 1), VersionKey("counted", 1))
    await gate.show([replica], [model("first", 100), model("counted", 100)])
    caller = await gate.caller("c")

    async def reported() -> bool:
        await caller.ask("first")
        return counted(figures, "first").total() > 0

    await until(reported, "Envoy has begun to report")
    assert all(answer.ok for answer in await caller.ask_often("counted", 45))
    backends[0].before = fail
    assert not any(answer.ok for answer in await caller.ask_often("counted", 5))
    expected = {"ok": 45, "failed": 5}
    await until(lambda: counted(figures, "counted") == expected, "each is counted, by what became of it")


def counted(figures: InMemoryMetricReader, name: str) -> Counter[str]:
    """Of version 1 of a model, by outcome."""
    data = figures.get_metrics_data()
    found: Counter[str] = Counter()
    for resource in data.resource_metrics if data is not None else ():
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            for point in metric.data.data_points if metric.name == REQUESTS else ():
                labels = dict(point.attributes or {})
                if (labels["model"], labels["version"]) == (name, "1"):
                    found[str(labels["outcome"])] += int(point.value)
    return found
