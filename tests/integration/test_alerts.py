"""Alerts as people and receivers meet them: the real service and store, a real receiver, and what fails."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from services.core import certificates
from services.core.authority import Authority
from services.core.settings import load
from services.core.telemetry import metering
from services.gateway.keys import KeyRing
from services.metrics.alerts import webhook
from services.metrics.alerts.notices import Notice, Notification
from services.metrics.app import MetricsSettings
from tests.alerting import FIRING, HOT, RESOLVED, Answering, Receiver, Suite, hurry, suite
from tests.waiting import pause, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


async def test_an_alert_goes_from_a_point_to_the_receiver_and_back_and_through_a_restart(
    tmp_path: Path, receiver: Receiver
) -> None:
    secrets = {"alerts_webhook_token": "t0ken", "alerts_webhook_secret": "s3cret", "alerts_url": "http://c"}
    async with suite(tmp_path, receiver.url, **secrets) as made:
        await made.create()
        await made.measured("kitchen", 180)
        await until(lambda: receiver.told("hot"), "the receiver is told")
        (alert,) = (await made.alerts(FIRING)).values()
        assert alert.summary == "kitchen is at 180"
    async with suite(tmp_path, receiver.url, **secrets) as made:
        await made.evaluated()
        assert (await made.alerts(FIRING))["kitchen"].fired_time == alert.fired_time
        await pause(0.3, "a second notification of the same firing would come in this time")
        assert len(receiver.told("hot")) == 1
        receiver.status = 503
        await made.measured("kitchen", 20)
        await until(lambda: made.alerts(RESOLVED), "it is resolved")
        await until(lambda: receiver.asked >= 2, "the receiver was asked, and refused")
    receiver.status = 200
    async with suite(tmp_path, receiver.url, **secrets):
        await until(lambda: len(receiver.told("hot")) == 2, "the end is not forgotten")
    first, last = receiver.told("hot")
    assert (first["version"], first["status"], last["status"]) == ("4", "firing", "resolved")
    (fired,), (ended,) = first["alerts"], last["alerts"]
    assert fired["labels"] == {"alertname": "hot", "severity": "warning", "room": "kitchen"}
    assert (fired["endsAt"], fired["status"], ended["status"]) == (
        "0001-01-01T00:00:00Z",
        "firing",
        "resolved",
    )
    assert ended["startsAt"] == fired["startsAt"] < ended["endsAt"]
    assert ended["fingerprint"] == fired["fingerprint"] == alert.fingerprint
    for name in (
        "groupKey",
        "truncatedAlerts",
        "receiver",
        "commonLabels",
        "commonAnnotations",
        "externalURL",
    ):
        assert name in first
    _, headers, body = receiver.taken[0]
    assert headers["authorization"] == "Bearer t0ken"
    sent_at, _, digest = headers[webhook.SIGNATURE].removeprefix("t=").partition(",v1=")
    expected = hmac.new(b"s3cret", sent_at.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert digest == expected


@pytest.mark.parametrize("fault", ["slow", "dead", "500"])
async def test_a_receiver_that_fails_holds_up_no_evaluation_and_is_told_in_the_end(
    tmp_path: Path, receiver: Receiver, fault: str
) -> None:
    store, url = Answering(), receiver.url
    if fault == "dead":
        url = "http://127.0.0.1:9/hook"
    elif fault == "slow":
        receiver.answering.clear()
    else:
        receiver.status = 500
    async with suite(tmp_path, url, store) as made:
        store.hot("kitchen")
        await made.create()
        await until(lambda: made.alerts(FIRING), "it fires")
        if fault != "dead":
            await until(lambda: receiver.asked, "the receiver was asked")
        store.hot("kitchen", "hall")
        await made.evaluated()
        assert set(await made.alerts(FIRING)) == {"kitchen", "hall"}
        assert not receiver.taken
        receiver.status = 200
        receiver.answering.set()
        if fault == "dead":
            return
        await until(lambda: receiver.told("hot"), "it is told in the end")
        await until(lambda: len(receiver.told("hot")[-1]["alerts"]) == 2, "with what fired meanwhile")


async def test_while_the_store_is_away_nobody_knows(tmp_path: Path, receiver: Receiver) -> None:
    store = Answering()
    async with suite(tmp_path, receiver.url, store) as made:
        store.hot("kitchen")
        await made.create()
        await until(lambda: receiver.told("hot"), "the receiver is told")
        store.away.set()
        await made.evaluated()
        await made.evaluated()
        status = (await made.rule()).status
        assert status.health == alerts_pb2.RULE_HEALTH_UNKNOWN
        assert "away" in status.error
        assert (await made.alerts(FIRING))["kitchen"].unknown
        assert "unknown, since the store does not answer" in (await made.cli())[1]
        assert len(receiver.told("hot")) == 1
        store.away.clear()
        await made.evaluated()
        assert (await made.rule()).status.health == alerts_pb2.RULE_HEALTH_OK
        assert list(await made.alerts(FIRING)) == ["kitchen"]


async def test_files_that_are_corrupt_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "alerts"
    folder.mkdir()
    (folder / "state.json").write_bytes(b'{"alerts": {"hot": [{"labels": 3')
    (folder / "rules.json").write_text('{"rules": 7}')
    store = Answering()
    async with suite(tmp_path, store=store) as made:
        assert {path.name for path in folder.iterdir()} >= {"state.json.corrupt", "rules.json.corrupt"}
        await made.create()
        store.hot("kitchen")
        await until(lambda: made.alerts(FIRING), "it fires")
    kept = json.loads((folder / "rules.json").read_text())
    kept["rules"].append({"name": "of a later version", "forecast": {}})
    (folder / "rules.json").write_text(json.dumps(kept))
    async with suite(tmp_path, store=store) as made:
        assert (await made.rule()).rule.name == "hot"


async def test_on_a_full_disk_alerts_go_on_and_what_cannot_be_kept_is_refused(
    tmp_path: Path, receiver: Receiver
) -> None:
    """No file of this process may grow, as on a full disk."""
    store, state = Answering(), tmp_path / "alerts" / "state.json"
    async with suite(tmp_path, receiver.url, store) as made:
        await made.create()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            store.hot("kitchen")
            await until(lambda: receiver.told("hot"), "it fires and is told")
            with pytest.raises(grpc.aio.AioRpcError, match=r"rules\.json"):
                await made.create(replace(HOT, name="other"))
            assert not state.exists()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await until(state.exists, "what fires is kept when there is room")
        await made.create(replace(HOT, name="other"))
    async with suite(tmp_path, receiver.url, store) as made:
        assert list(await made.alerts(FIRING)) == ["kitchen"]
        await made.evaluated()
        assert len(receiver.told("hot")) == 1


async def test_a_silence_holds_back_and_ends(tmp_path: Path, receiver: Receiver) -> None:
    store = Answering()
    async with suite(tmp_path, receiver.url, store) as made:
        code, said = await made.cli(
            "silence", "alertname=hot", "room=kit*", "--for", "1h", "--reason", "repairs"
        )
        assert code == 0, said
        await made.create()
        store.hot("kitchen", "hall")
        await until(lambda: receiver.told("hot"), "the receiver is told")
        assert [alert["labels"]["room"] for alert in receiver.told("hot")[-1]["alerts"]] == ["hall"]
        (silence,) = (await made.stub.ListSilences(alerts_pb2.ListSilencesRequest())).silences
        assert list((await made.alerts(FIRING))["kitchen"].silenced_by) == [silence.id]
        assert "silenced" in (await made.cli())[1]
        assert (await made.cli("unsilence", silence.id))[0] == 0
        await until(lambda: len(receiver.told("hot")[-1]["alerts"]) == 2, "the receiver is told of the other")
        code, said = await made.cli("unsilence", silence.id)
        assert code == 1
        assert "no silence" in said


async def test_rules_of_ours_are_disabled_and_replaced_but_not_changed(tmp_path: Path) -> None:
    async with suite(tmp_path, store=Answering()) as made:
        assert (await made.cli("rules", "disable", "queue-growing"))[0] == 0
        ours = await made.rule("queue-growing")
        assert ours.rule.default_rule
        assert ours.status.health == alerts_pb2.RULE_HEALTH_DISABLED
        ours.rule.summary = "another"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await made.stub.UpdateAlertRule(metrics_pb2.UpdateAlertRuleRequest(rule=ours.rule), timeout=5)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        code, said = await made.cli("rules", "delete", "queue-growing")
        assert code == 1
        assert "disable it" in said
        created = (
            "rules",
            "create",
            "queue-growing",
            "oven",
            "--above",
            "7",
            "--window",
            "1m",
            "--by",
            "room",
        )
        code, said = await made.cli(*created)
        assert code == 0, said
        replaced = (await made.rule("queue-growing")).rule
        assert (replaced.default_rule, replaced.disabled, replaced.threshold.value) == (False, False, 7)
        code, said = await made.cli(*created)
        assert code == 1
        assert "there is a rule" in said
    async with suite(tmp_path, store=Answering()) as made:
        assert (await made.rule("queue-growing")).rule.threshold.value == 7
        assert (await made.cli("rules", "delete", "queue-growing"))[0] == 0
        assert (await made.rule("queue-growing")).rule.default_rule
        listed = json.loads((await made.cli("rules", "list", "--output", "json"))[1])
        assert {"error-budget-fast", "replica-down", "queue-growing"} <= {
            entry["rule"]["name"] for entry in listed
        }
        code, said = await made.cli("rules", "create", "x", "oven", "--above", "7", "--window", "1s")
        assert code == 1
        assert "rule.threshold.window" in said


async def test_a_rule_that_is_deleted_is_resolved_for_its_receiver(
    tmp_path: Path, receiver: Receiver
) -> None:
    store = Answering()
    async with suite(tmp_path, receiver.url, store) as made:
        store.hot("kitchen")
        await made.create()
        await until(lambda: receiver.told("hot"), "the receiver is told")
        assert (await made.cli("rules", "delete", "hot"))[0] == 0
        await until(lambda: receiver.told("hot")[-1]["status"] == "resolved", "and that it is over")


async def test_of_an_explosion_of_series_so_many_are_followed_and_it_is_said(tmp_path: Path) -> None:
    store = Answering()
    async with suite(tmp_path, store=store) as made:
        store.hot(*(f"r{number:04}" for number in range(3_000)))
        await made.create()
        await until(lambda: made.alerts(FIRING), "they fire")
        await made.evaluated()
        assert len(await made.alerts()) == 100
        status = (await made.rule()).status
        assert status.overflowed == 2_900
        assert len(status.overflowed_series) == 10
        assert status.overflowed_series[0].startswith("room=r")
        written = (tmp_path / "alerts" / "state.json").stat().st_mtime_ns
        await made.evaluated()
        await made.evaluated()
        assert (tmp_path / "alerts" / "state.json").stat().st_mtime_ns == written, "nothing new, and written"


async def test_only_admins_write_where_callers_are_known(tmp_path: Path, receiver: Receiver) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    (tmp_path / "jwks.json").write_text(json.dumps(ring.jwks()))
    known: dict[str, Any] = {"jwks": tmp_path / "jwks.json", "audit_log": tmp_path / "audit.jsonl"}
    async with suite(tmp_path, receiver.url, Answering(), **known) as made:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await made.create()
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        (tmp_path / "dev.key").write_text(ring.mint("alice", 60).key)
        code, said = await made.cli("silence", "room=x", "--reason", "why")
        assert code == 1
        assert "admin key" in said
        assert (await made.cli("list", "--output", "json")) == (0, "[]\n")
        (tmp_path / "dev.key").write_text(ring.mint("root", 60, admin=True).key)
        assert (await made.cli("silence", "room=x", "--reason", "why"))[0] == 0
        assert "root" in (await made.cli("silences"))[1]
        code, said = await made.cli("test")
        assert code == 0, said
        assert receiver.told("test")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {"CreateAlertRule", "CreateSilence", "TestWebhook"}
    async with suite(tmp_path, store=Answering(), jwks=tmp_path / "jwks.json") as made:
        code, said = await made.cli("test")
        assert code == 1
        assert "LINGQU_ALERTS_WEBHOOK" in said


async def test_a_receiver_that_drips_or_refuses_is_given_up(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    notification = Notification("test", (Notice((("alertname", "test"),), "", 0.0, 1),), ())
    receiver.answering.clear()
    sender = webhook.Webhook(webhook.Target(receiver.url), read_s=0.1)
    with pytest.raises(webhook.WebhookFailed) as slow:
        await asyncio.to_thread(sender.send, notification)
    assert not slow.value.answered
    receiver.answering.set()
    receiver.status = 302
    with pytest.raises(webhook.WebhookFailed) as refused:
        await asyncio.to_thread(sender.send, notification)
    assert refused.value.answered
    sender.close()
    assert "/hook" not in caplog.text


def test_a_wrong_webhook_is_told_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("hooks.example/s3cret", "https://user:s3cret@hooks.example/"):
        monkeypatch.setenv("LINGQU_ALERTS_WEBHOOK", url)
        with pytest.raises(SystemExit):
            load(MetricsSettings)
        said = capsys.readouterr().err
        assert "LINGQU_ALERTS_WEBHOOK" in said
        assert "s3cret" not in said
    assert "s3cret" not in repr(webhook.Target("https://x/s3cret", "s3cret", "s3cret"))


async def test_a_certificate_that_ends_soon_is_told_until_it_is_renewed(tmp_path: Path) -> None:
    authority = Authority.at(tmp_path / "ca")
    path = tmp_path / "public.pem"

    async def firing(made: Suite) -> set[str]:
        answer = await made.stub.ListAlerts(alerts_pb2.ListAlertsRequest(states=[FIRING]), timeout=10)
        of_ours = {a.rule: a for a in answer.alerts if a.labels.get("certificate") == "public"}
        assert all("public of gate at here expires in" in alert.summary for alert in of_ours.values())
        return set(of_ours)

    async with suite(tmp_path) as made:
        address = Layout(tmp_path, made.offset).address(at.METRICS)
        authority.issue(path, "", ["127.0.0.1"], days=2)
        with metering("gate", address, instance="here", every_s=0.1) as meter:
            certificates.tell_days_left(meter, [certificates.Used("public", path)])

            async def fire(*expected: str) -> bool:
                return await firing(made) == set(expected)

            await until(lambda: fire("certificate-expires", "certificate-expires-soon"), "both fire")
            authority.issue(path, "", ["127.0.0.1"], days=100)
            await until(lambda: fire(), "neither is left")
