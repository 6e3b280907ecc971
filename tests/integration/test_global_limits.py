"""Global limits through real Envoys, control planes, a registry and etcd: what callers see, and what happens
when parts of it are away."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest

from bench.fleet import MODEL, Caller, Fleet, Gateway, fleet
from deploy.local import layout as at
from lingqu.client import LingquError
from lingqu.gateway.v1 import limiter_pb2
from lingqu.gateway.v1.limiter_pb2_grpc import LimiterServiceStub
from lingqu.registry.v1 import access_pb2
from tests.conftest import free_offset
from tests.waiting import pause, until

OK, OVER = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
# What a request waits for the limiter at most; this machine is busy.
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    settings = {"LINGQU_LIMITS_FAIL": "closed", "LINGQU_LIMITS_TIMEOUT_S": str(TIMEOUT_S)}
    async with fleet(tmp_path_factory.mktemp("two"), free_offset, [settings] * 2) as made:
        yield made


async def limited(made: Fleet, client: str, **limits: int) -> list[Caller]:
    """A client whose limits every gateway enforces by now, at each of them."""
    await made.limit(client, **limits)
    callers = [Caller(made, gateway, client) for gateway in made.gateways]

    async def enforced() -> bool:
        codes = [await caller.ask() for caller in callers]
        # An owner that is new is closed for a second: who is refused then has not used its limit up.
        used_up = OVER in codes and limits.get("requests_per_second", 0) < 1000
        return used_up or (codes == [OK, OK] and all("x-ratelimit-limit" in c.metadata for c in callers))

    await until(enforced, "all gateways ask for the limit")
    return callers


def asked(gateway: Gateway) -> int:
    """How often its Envoy has asked the limiter."""
    url = f"http://{gateway.layout.address(at.ENVOY_ADMIN)}/stats?format=json&filter=cluster.limiter.upstream_rq_total"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return sum(int(stat.get("value", 0)) for stat in json.load(answer)["stats"])


async def test_a_limit_of_a_second_holds_over_two_gateways(two: Fleet) -> None:
    callers = await limited(two, "second", requests_per_second=5)
    await pause(1.1, "what was counted until now leaves the window")
    begun = time.monotonic()
    codes = Counter([await caller.ask() for _ in range(6) for caller in callers])
    if time.monotonic() - begun < 0.9:
        assert codes == {OK: 5, OVER: 7}
    refusal = callers[0].refused[-1]
    error = LingquError(refusal)
    assert error.reason == "LIMIT_REACHED"
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 1
    headers = dict(refusal.trailing_metadata() or ())
    assert headers["retry-after"] == "1"
    assert headers["x-ratelimit-limit"] == '5, 5;w=1;name="requests"'
    assert headers["x-ratelimit-remaining"] == "0"
    await pause(error.retry_after_s, "as it was told")
    assert await callers[0].ask() == OK


async def test_a_limit_of_a_minute_is_exact_over_two_gateways(two: Fleet) -> None:
    callers = await limited(two, "minute", requests_per_minute=40)
    used = 40 - min(int(caller.metadata["x-ratelimit-remaining"]) for caller in callers)
    codes = Counter(await asyncio.gather(*(caller.ask() for _ in range(40) for caller in callers)))
    assert codes == {OK: 40 - used, OVER: 40 + used}


async def test_a_second_may_be_each_gateways_and_the_minute_all_gateways(two: Fleet) -> None:
    local = access_pb2.Limits.SCOPE_LOCAL
    limits = {"requests_per_second": 2, "requests_per_second_scope": local, "requests_per_minute": 10_000}
    callers = await limited(two, "apart", **limits)
    await pause(1.1, "the buckets of both gateways are full again")
    before, begun = [asked(gateway) for gateway in two.gateways], time.monotonic()
    for caller in callers:
        caller.refused.clear()
    codes = [[await caller.ask() for _ in range(6)] for caller in callers]
    passed = [each.count(OK) for each in codes]
    assert min(passed) >= 2  # each gateway's own
    if time.monotonic() - begun < 0.9:
        assert max(passed) <= 3
    for caller, gateway, number, already in zip(callers, two.gateways, passed, before, strict=True):
        assert "2 requests per second" in (caller.refused[0].details() or "")
        assert asked(gateway) - already == number  # what the gateway refuses itself costs no call


async def test_a_limit_of_a_model_is_shared_by_all_clients(two: Fleet) -> None:
    callers = [Caller(two, gateway, name) for gateway in two.gateways for name in ("one", "other")]
    await two.limit_model(requests_per_second=4)
    try:

        async def enforced() -> bool:
            await asyncio.gather(*(caller.ask() for caller in callers * 3))
            return all(caller.refused for caller in callers)

        await until(enforced, "all gateways know the limit")
        assert "model_" not in LingquError(callers[0].refused[-1]).reason
        assert f'model "{MODEL}"' in (callers[0].refused[-1].details() or "")
    finally:
        await two.limit_model()
        await until(lambda: _all_pass(callers), "the limit is gone")


async def _all_pass(callers: list[Caller]) -> bool:
    """At once: one after the other may be slower than the limit."""
    return set(await asyncio.gather(*(caller.ask() for caller in callers * 5))) == {OK}


async def test_whoever_has_no_global_limit_does_not_cost_a_call(two: Fleet) -> None:
    limited_one = (await limited(two, "paying", requests_per_second=1000))[0]
    free, gateway = Caller(two, two.gateways[0], "free"), two.gateways[0]
    before = asked(gateway)
    for _ in range(10):
        assert await free.ask() == OK
    assert asked(gateway) == before
    assert "x-ratelimit-limit" not in free.metadata
    assert await limited_one.ask() == OK, limited_one.refused[-1].details()
    assert asked(gateway) == before + 1


async def test_tokens_that_were_reported_stop_further_requests(two: Fleet) -> None:
    callers = await limited(two, "tokens", tokens_per_minute=100)
    usage = limiter_pb2.Usage(client="tokens", model=MODEL, tokens=60)
    for sequence, expected in ((1, OK), (1, OK), (2, OVER)):
        request = limiter_pb2.ReportUsageRequest(reporter="r", sequence=sequence, usages=[usage])
        async with grpc.aio.insecure_channel(two.gateways[sequence % 2].limiter) as channel:
            await LimiterServiceStub(channel).ReportUsage(request, timeout=5)  # type: ignore[misc]
        assert [await caller.ask() for caller in callers] == [expected] * 2
    error = LingquError(callers[0].refused[-1])
    assert error.retry_after_s is not None
    assert 50 < error.retry_after_s <= 60


async def test_no_request_fails_while_a_control_plane_stops_and_starts_again(two: Fleet) -> None:
    """Neither at its own Envoy nor at that of the one that takes its part over."""
    names = [f"rolling-{number}" for number in range(6)]  # some of each one's part
    callers = [caller for name in names for caller in await limited(two, name, requests_per_second=1000)]
    codes: Counter[grpc.StatusCode] = Counter()

    async def ask(caller: Caller) -> None:
        while True:
            codes[await caller.ask()] += 1
            await pause(0.01, "the pace of a caller")

    async def more(each: int) -> None:
        goal = codes.total() + each * len(callers)
        await until(lambda: codes.total() >= goal, "so many more answers")

    asking = [asyncio.create_task(ask(caller)) for caller in callers]
    await two.gateways[1].control.stop()
    await more(2)
    await two.gateways[1].control.start()
    await more(5)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert codes.keys() == {OK}, codes
