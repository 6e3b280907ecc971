"""Those who watch alerts: told how things stand and of every change, and cut off when they are slow."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from services.metrics import tails
from tests.alerting import FIRING, HOT, INACTIVE, RESOLVED, Answering, hurry, suite
from tests.waiting import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def what(response: alerts_pb2.WatchAlertsResponse) -> tuple[str, int, int]:
    return response.alert.labels["room"], response.before, response.alert.state


async def drained(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        continue


async def test_who_watches_is_told_how_things_stand_and_every_change(tmp_path: Path) -> None:
    store = Answering()
    store.hot("kitchen")
    async with suite(tmp_path, store=store) as made:
        await made.create()
        await until(lambda: made.alerts(FIRING), "it fires")
        watch = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(rule="hot"), timeout=20)
        found = await watch.read()
        assert what(found) == ("kitchen", alerts_pb2.ALERT_STATE_UNSPECIFIED, FIRING)
        assert found.alert.summary == "kitchen is at 200"
        assert (await watch.read()).current
        store.hot("kitchen", "hall")
        assert what(await watch.read()) == ("hall", INACTIVE, FIRING)
        store.hot("hall")
        ended = await watch.read()
        assert what(ended) == ("kitchen", FIRING, RESOLVED)
        assert ended.alert.fingerprint == found.alert.fingerprint
        assert ended.alert.HasField("resolved_time")
        # With its rule an alert is gone, and those who watch hear of it.
        await made.stub.DeleteAlertRule(metrics_pb2.DeleteAlertRuleRequest(name="hot"), timeout=10)
        gone = [what(await watch.read()) for _ in range(2)]
        assert sorted(gone) == [("hall", FIRING, INACTIVE), ("kitchen", RESOLVED, INACTIVE)]
        watch.cancel()


async def test_a_watch_may_be_for_some_states(tmp_path: Path) -> None:
    store = Answering()
    store.hot("kitchen")
    async with suite(tmp_path, store=store) as made:
        await made.create(replace(HOT, for_s=0.3))
        watch = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(states=[FIRING]), timeout=20)
        assert (await watch.read()).current
        assert what(await watch.read()) == ("kitchen", alerts_pb2.ALERT_STATE_PENDING, FIRING)
        watch.cancel()


async def test_after_a_restart_a_watch_is_told_what_still_fires(tmp_path: Path) -> None:
    store = Answering()
    async with suite(tmp_path, store=store) as made:
        await made.create()
        watch = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(), timeout=20)
        assert (await watch.read()).current
        store.hot("kitchen")
        before = await watch.read()
        assert what(before) == ("kitchen", INACTIVE, FIRING)
    async with suite(tmp_path, store=store) as made:
        watch = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(), timeout=20)
        again = await watch.read()
        assert what(again) == ("kitchen", alerts_pb2.ALERT_STATE_UNSPECIFIED, FIRING)
        assert again.alert.fired_time == before.alert.fired_time
        assert (await watch.read()).current
        watch.cancel()


async def test_a_watcher_that_takes_nothing_is_cut_off_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing, so that what is sent to it fills the windows of its connection and then stalls."""
    monkeypatch.setattr(tails, "STALL_S", 0.3)
    monkeypatch.setattr(tails, "MAX_TAILS", 2)
    store = Answering()
    rooms = [f"room{n}" + "x" * 10_000 for n in range(90)]
    async with suite(tmp_path, store=store) as made, made.another() as others:
        await made.create()
        slow = others.WatchAlerts(alerts_pb2.WatchAlertsRequest(rule="hot"), timeout=30)
        quick = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(rule="hot"), timeout=30)
        heard: list[str] = []

        async def reading() -> None:
            async for change in quick:
                heard.append(change.alert.labels["room"])

        reader = asyncio.ensure_future(reading())

        async def room_for_another() -> bool:
            store.hot(*(() if store.found else rooms))
            await made.evaluated()
            third = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(rule="none"), timeout=5)
            with suppress(grpc.aio.AioRpcError):
                await third.read()
                third.cancel()
                return True
            assert await third.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            return False

        await until(room_for_another, "it is cut off", timeout_s=20)
        with pytest.raises(grpc.aio.AioRpcError, match="follow again") as cut:
            await drained(slow)
        assert cut.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        store.hot("kitchen")
        await until(lambda: "kitchen" in heard, "others are told on")
        assert set(rooms) <= set(heard)
        reader.cancel()


async def test_a_watcher_that_falls_behind_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "MAX_WAITING", 10)
    store = Answering()
    async with suite(tmp_path, store=store) as made:
        await made.create()
        watch = made.stub.WatchAlerts(alerts_pb2.WatchAlertsRequest(), timeout=20)
        assert (await watch.read()).current
        store.hot(*(f"room{n}" for n in range(11)))
        with pytest.raises(grpc.aio.AioRpcError, match="more than 10 changes of alerts") as cut:
            await watch.read()
        assert cut.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_command_watches_through_a_restart(tmp_path: Path) -> None:
    store, lingqu = Answering(), Path(sys.executable).with_name("lingqu")
    store.hot("kitchen")

    async def line() -> str:
        assert process.stdout is not None
        return (await asyncio.wait_for(process.stdout.readline(), 20)).decode()

    async with suite(tmp_path, store=store) as first:
        await first.create()
        await until(lambda: first.alerts(FIRING), "it fires")
        process = await asyncio.create_subprocess_exec(
            lingqu, "--state", str(tmp_path), "alerts", "watch", stdout=PIPE, stderr=DEVNULL
        )
        begun = await line()
    try:
        assert "warning hot room=kitchen firing since" in begun
        assert "kitchen is at 200" in begun
        async with suite(tmp_path, store=store, offset=first.offset):
            assert "hot room=kitchen firing since" in await line()
            store.hot()
            assert "resolved (was firing)" in await line()
    finally:
        process.terminate()
        await process.wait()
