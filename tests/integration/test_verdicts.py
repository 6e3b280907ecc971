"""Rollouts that the metrics service judges: a real registry on a real etcd, requests told as Envoy tells
them, answers as inference does."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from lingqu.metrics.v1 import answers_pb2
from lingqu.metrics.v1.answers_pb2_grpc import AnswerServiceStub
from lingqu.registry.v1 import models_pb2, rollouts_pb2
from lingqu.registry.v1.rollouts_pb2 import (
    ROLLOUT_STATE_ROLLED_BACK,
    ROLLOUT_STATE_RUNNING,
    ROLLOUT_STATE_SUCCEEDED,
    VERDICT_FAIL,
    VERDICT_PASS,
)
from services.gateway.keys import KeyRing
from services.metrics.verdicts import judge
from tests.conftest import EtcdServer
from tests.metrics import Service
from tests.metrics import running as service_running
from tests.registries import Api, refused, served, weights
from tests.waiting import until

FAILED = answers_pb2.AnswerFailure()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "BLOCK_S", 0.05)
    monkeypatch.setattr(judge, "FIGURES_S", 0.2)
    monkeypatch.setattr(judge, "KEPT_S", 0.1)


@pytest.fixture
async def api(etcd_server: EtcdServer) -> AsyncIterator[Api]:
    async with served(etcd_server) as found:
        await found.create()
        await found.create()
        await found.host(1, 2)
        await found.promote(1)
        yield found


class Traffic:
    """What Envoy and inference tell one metrics service of."""

    def __init__(self, service: Service, channel: grpc.aio.Channel) -> None:
        self.service = service
        self._log = als_pb2_grpc.AccessLogServiceStub(channel).StreamAccessLogs()
        self._answers: Any = AnswerServiceStub(channel)
        self._draw, self._numbers = random.Random(1), itertools.count()

    async def requests(
        self, version: int, number: int, *, failing: float = 0.01, seconds: float = 0.1, model: str = "m"
    ) -> None:
        message = als_pb2.StreamAccessLogsMessage()
        for _ in range(number):
            status = "14" if self._draw.random() < failing else "0"
            message.http_logs.log_entry.append(self._entry(version, status, seconds, model))
        await self._log.write(message)

    async def tensors(self, version: int, number: int, *, failing: float, percent: int) -> int:
        """How many of these requests were drawn; each that failed is told apart from that."""
        message, drawn = als_pb2.StreamAccessLogsMessage(), 0
        for _ in range(number):
            status = "14" if self._draw.random() < failing else "0"
            tags = [{"weight": f"{100 / percent:g}"}] if self._draw.random() * 100 < percent else []
            drawn += len(tags)
            for tag in (*tags, *([{"failure": "1"}] if status != "0" else [])):
                entry = self._entry(version, status, 0.1)
                entry.common_properties.custom_tags.update(tag)
                message.http_logs.log_entry.append(entry)
        await self._log.write(message)
        return drawn

    def _entry(
        self, version: int, status: str, seconds: float, model: str = "m"
    ) -> accesslog_pb2.HTTPAccessLogEntry:
        entry = accesslog_pb2.HTTPAccessLogEntry()
        entry.common_properties.upstream_cluster = f"text/{model}/{version}"
        entry.common_properties.start_time.GetCurrentTime()
        entry.common_properties.time_to_last_downstream_tx_byte.FromNanoseconds(
            int(seconds * self._draw.uniform(0.5, 1.5) * 1e9)
        )
        entry.response.response_code.value = 200
        entry.response.response_trailers["grpc-status"] = status
        return entry

    async def answers(
        self, number: int, original: Any, copy: Any, versions: tuple[int, int] = (1, 2)
    ) -> None:
        """So many requests, each answered by both versions."""
        request = answers_pb2.ReportAnswersRequest()
        for _ in range(number):
            place = next(self._numbers)
            for content, version in zip((original, copy), versions, strict=True):
                request.answers.append(
                    answer(content, f"r{place}", place, version, copy=version == versions[1])
                )
        await self.report(request)

    async def report(self, request: answers_pb2.ReportAnswersRequest) -> None:
        await self._answers.ReportAnswers(request, timeout=5)

    async def until_state(self, api: Api, state: int, during: Any) -> rollouts_pb2.Rollout:
        """`during` goes on until the rollout is in that state."""

        async def reached() -> rollouts_pb2.Rollout | None:
            await during()
            found = await api.rollout()
            return found if found.state == state else None

        found = await until(reached, f"{rollouts_pb2.RolloutState.Name(state)}")  # type: ignore[arg-type]
        assert found
        return found


def answer(content: Any, request: str, number: int, version: int, *, copy: bool) -> answers_pb2.Answer:
    made = answers_pb2.Answer(model="m", version=version, pair=request, copy=copy, input=number)
    for name, kind in (
        ("labels", answers_pb2.AnswerLabels),
        ("tokens", answers_pb2.AnswerTokens),
        ("failure", answers_pb2.AnswerFailure),
    ):
        if isinstance(content, kind):
            getattr(made, name).CopyFrom(content)
    return made


def vectors_of(*rows: bytes) -> answers_pb2.Vectors:
    return answers_pb2.Vectors(vectors=[answers_pb2.Vector(fp16=row) for row in rows])


def label(name: str) -> answers_pb2.AnswerLabels:
    return answers_pb2.AnswerLabels(labels=[name])


@asynccontextmanager
async def judged(folder: Path, api: Api, **settings: Any) -> AsyncIterator[Traffic]:
    folder.mkdir(exist_ok=True)
    async with (
        service_running(folder, registry=api.address, **settings) as service,
        grpc.aio.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield Traffic(service, channel)


@pytest.fixture
async def traffic(tmp_path: Path, api: Api) -> AsyncIterator[Traffic]:
    async with judged(tmp_path / "metrics", api) as made:
        yield made


async def start(api: Api, *percents: int, wait_s: int = 60, **fields: Any) -> rollouts_pb2.Rollout:
    """Copies alone are not waited for."""
    steps = [rollouts_pb2.RolloutStep(percent=p, wait=Duration(seconds=wait_s * (p > 0))) for p in percents]
    plan = rollouts_pb2.RolloutPlan(steps=steps, **fields)
    request = rollouts_pb2.StartRolloutRequest(model="m", version=2, plan=plan)
    return (await api.rollouts.StartRollout(request, timeout=5)).rollout  # type: ignore[no-any-return]


async def test_a_version_that_fails_is_rolled_back_by_itself(api: Api, traffic: Traffic) -> None:
    await start(api, 10)

    async def going() -> None:
        await traffic.requests(1, 45)
        await traffic.requests(2, 5, failing=0.5)

    ended = await traffic.until_state(api, ROLLOUT_STATE_ROLLED_BACK, going)
    assert "requests failed" in ended.detail
    assert ended.report.verdict == VERDICT_FAIL
    assert ended.report.figures["error_rate"] > ended.report.figures["error_rate_before"]
    assert weights(await api.model()) == {1: 100}
    assert ended.report.samples < 150, "of the version's own requests"


async def test_a_slow_version_is_rolled_back_and_one_that_is_as_fast_passes(
    api: Api, traffic: Traffic
) -> None:
    await start(api, 10, 50, wait_s=0, require_pass=True)

    async def alike() -> None:
        await traffic.requests(1, 45)
        await traffic.requests(2, 15)

    ended = await traffic.until_state(api, ROLLOUT_STATE_SUCCEEDED, alike)
    assert ended.step == 1, "each step had its own PASS"
    assert weights(await api.model()) == {2: 100}
    await api.rollback()
    await start(api, 10, wait_s=60)

    async def slow() -> None:
        await traffic.requests(1, 45)
        await traffic.requests(2, 5, seconds=0.4)

    ended = await traffic.until_state(api, ROLLOUT_STATE_ROLLED_BACK, slow)
    assert "took more than 1.25 times" in ended.detail


async def test_copies_alone_say_whether_a_version_answers_the_same(api: Api, traffic: Traffic) -> None:
    """Before anybody gets an answer of it."""
    await start(api, 0, 10, shadow_percent=100, require_pass=True)
    model = await api.model()
    assert (weights(model), model.traffic.shadow_version) == ({1: 100}, 2)

    async def alike() -> None:
        await traffic.answers(20, label("good"), label("good"))

    async def at_ten() -> bool:
        await alike()
        return (await api.rollout()).step == 1

    await until(at_ten, "the step of copies is over")
    model = await api.model()
    assert (weights(model), model.traffic.shadow_version) == ({1: 90, 2: 10}, 2)
    compared = traffic.service.store.values(
        "answers.compared", "difference", version="2", by="label_agreement"
    )
    assert compared
    assert set(compared) == {0.0}

    async def unlike() -> None:
        await traffic.answers(5, label("good"), label("bad"))

    ended = await traffic.until_state(api, ROLLOUT_STATE_ROLLED_BACK, unlike)
    assert "labels agree" in ended.detail
    assert ended.report.figures["label_agreement"] < 1
    assert (await api.model()).traffic.shadow_version == 0


async def test_copies_that_fail_are_a_reason(api: Api, traffic: Traffic) -> None:
    await start(api, 0, 10, shadow_percent=100)
    ended = await traffic.until_state(
        api, ROLLOUT_STATE_ROLLED_BACK, lambda: traffic.answers(5, label("good"), FAILED)
    )
    assert "copied requests failed" in ended.detail


async def test_what_the_plan_allows_is_allowed(api: Api, traffic: Traffic) -> None:
    judgement = rollouts_pb2.Judgement(label_disagreement=1, error_increase=1, slowdown=0, least=30)
    await start(api, 10, wait_s=0, require_pass=True, judgement=judgement)

    async def terrible() -> None:
        await traffic.requests(1, 40, failing=0.0)
        await traffic.requests(2, 10, failing=0.9, seconds=5)
        await traffic.answers(5, label("good"), label("bad"))

    await traffic.until_state(api, ROLLOUT_STATE_SUCCEEDED, terrible)


async def test_a_rollout_without_judgement_gets_figures_and_no_opinion(api: Api, traffic: Traffic) -> None:
    await start(api, 10, judgement=rollouts_pb2.Judgement(off=True))

    async def reported() -> rollouts_pb2.Rollout | None:
        await traffic.requests(1, 40)
        await traffic.requests(2, 40, failing=1.0)
        found = await api.rollout()
        return found if found.HasField("report") and found.report.samples > 300 else None

    found = await until(reported, "figures of many requests")
    assert found
    assert (found.state, found.report.verdict) == (ROLLOUT_STATE_RUNNING, 0)
    assert found.report.figures["error_rate"] == 1
    assert found.report.figures["evidence"] > 1


async def test_who_ends_a_rollout_by_hand_is_not_contradicted(api: Api, traffic: Traffic) -> None:
    """Nor does its evidence count against the next one."""
    await start(api, 10, judgement=rollouts_pb2.Judgement(off=True))
    for _ in range(20):
        await traffic.requests(1, 45)
        await traffic.requests(2, 5, failing=1.0)
    await api.rollouts.AbortRollout(rollouts_pb2.AbortRolloutRequest(model="m", reason="lunch"), timeout=5)
    await start(api, 10, wait_s=0, require_pass=True)

    async def alike() -> None:
        await traffic.requests(1, 45)
        await traffic.requests(2, 15)

    await traffic.until_state(api, ROLLOUT_STATE_SUCCEEDED, alike)


async def test_of_tensor_requests_those_that_were_drawn_are_judged(tmp_path: Path, api: Api) -> None:
    """However they ended. Failures are told beside them: with those a version would look worse than it is."""
    await start(api, 10)
    file = tmp_path / "metrics" / "verdicts.json"
    async with judged(tmp_path / "metrics", api) as traffic:
        await until(file.exists, "the rollout is followed")
        drawn = 0

        def seen() -> list[dict[str, int]]:
            (trial,) = json.loads(file.read_bytes())
            return [side["total"] for side in trial["sides"].values()]

        async def enough() -> bool:
            nonlocal drawn
            drawn += await traffic.tensors(1, 100, failing=0.3, percent=10)
            drawn += await traffic.tensors(2, 100, failing=0.3, percent=10)
            return min(side["requests"] for side in seen()) >= 50

        await until(enough, "requests are judged")
        assert sum(side["requests"] for side in seen()) <= drawn
        for side in seen():
            assert side["hits"] / side["requests"] == pytest.approx(0.3, abs=0.2)


async def test_evidence_outlives_the_service(tmp_path: Path, api: Api) -> None:
    await start(api, 10)
    folder = tmp_path / "metrics"
    async with judged(folder, api) as before:
        await until((folder / "verdicts.json").exists, "the rollout is followed")

        async def kept() -> bool:
            await before.requests(1, 45)
            await before.requests(2, 25, failing=0.0)
            (trial,) = json.loads((folder / "verdicts.json").read_bytes())
            return bool(trial["errors"]["after"]["requests"] >= 50)

        await until(kept, "what was seen is kept")
    async with judged(folder, api) as after:

        async def reported() -> bool:
            await after.requests(2, 1, failing=0.0)
            return (await api.rollout()).report.samples > 50

        await until(reported, "a report on those before and behind")


async def test_the_registry_may_be_away_for_a_while(etcd_server: EtcdServer, tmp_path: Path) -> None:
    async with served(etcd_server) as first:
        address = first.address
        for _ in range(2):
            await first.create()
        await first.host(1, 2)
        await first.promote(1)
        await start(first, 10)
        context = judged(tmp_path / "metrics", first)
        traffic = await context.__aenter__()
        await traffic.requests(1, 10)
        await until(lambda: traffic.service.store.values("requests"), "requests are told")
    try:
        for _ in range(20):
            await traffic.requests(1, 45)
            await traffic.requests(2, 5, failing=1.0)
        async with served(etcd_server, registry_listen=address) as again:
            await again.host(1, 2)

            async def going() -> None:
                await traffic.requests(1, 9)
                await traffic.requests(2, 1, failing=1.0)

            await traffic.until_state(again, ROLLOUT_STATE_ROLLED_BACK, going)
    finally:
        await context.__aexit__(None, None, None)


async def test_rollouts_of_two_models_are_judged_apart(api: Api, traffic: Traffic) -> None:
    """One begins while the other is in progress; the one that is well goes on."""
    for _ in range(2):
        await api.create("n")
    await api.host(1, 2, model="n", instance="i2")
    await api.promote(1, "n")
    await start(api, 10)
    plan = rollouts_pb2.RolloutPlan(steps=[rollouts_pb2.RolloutStep(percent=10, wait=Duration(seconds=60))])
    other = rollouts_pb2.StartRolloutRequest(model="n", version=2, plan=plan)
    await api.rollouts.StartRollout(other, timeout=5)

    async def going() -> None:
        await traffic.requests(1, 45)
        await traffic.requests(2, 5, failing=0.7)
        await traffic.requests(1, 45, model="n")
        await traffic.requests(2, 5, model="n")

    await traffic.until_state(api, ROLLOUT_STATE_ROLLED_BACK, going)

    async def reported() -> bool:
        await going()
        return (await api.rollout("n")).report.verdict == VERDICT_PASS

    await until(reported, "the other one has passed")
    assert (await api.rollout("n")).state == ROLLOUT_STATE_RUNNING


async def test_two_services_judge_what_comes_to_them(tmp_path: Path, api: Api) -> None:
    await start(api, 10)
    async with judged(tmp_path / "a", api) as one, judged(tmp_path / "b", api) as other:

        async def going() -> None:
            await one.requests(1, 45)
            await one.requests(2, 5)
            await other.requests(1, 45)
            await other.requests(2, 5, failing=0.6)

        await one.until_state(api, ROLLOUT_STATE_ROLLED_BACK, going)


async def test_a_policy_that_names_releasers_is_kept_to(
    etcd_server: EtcdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps(ring.jwks()))
    key = tmp_path / "key"
    key.write_text(ring.mint("judge", 600).key + "\n")
    as_judge = (("authorization", f"Bearer {key.read_text().strip()}"),)
    async with served(etcd_server, jwks=jwks) as api:
        for _ in range(2):
            await api.create()
        await api.host(1, 2)
        await api.promote(1)
        request = models_pb2.SetPolicyRequest(model="m", policy=models_pb2.Policy(releasers=["judge"]))
        admin = (("authorization", f"Bearer {ring.mint('admin', 60, admin=True).key}"),)
        await api.models.SetPolicy(request, timeout=5, metadata=admin)
        plan = rollouts_pb2.RolloutPlan(steps=[rollouts_pb2.RolloutStep(percent=10)], require_pass=True)
        start = rollouts_pb2.StartRolloutRequest(model="m", version=2, plan=plan)
        await api.rollouts.StartRollout(start, timeout=5, metadata=as_judge)
        async with judged(tmp_path / "nobody", api) as nobody:

            async def warned() -> bool:
                await nobody.requests(1, 45)
                await nobody.requests(2, 45)
                return "its policy names others" in caplog.text

            await until(warned, "the log says that the report was refused")
            assert not (await api.rollout()).HasField("report")
        async with judged(tmp_path / "judge", api, verdicts_key=key) as known:

            async def going() -> None:
                await known.requests(1, 45)
                await known.requests(2, 45)

            ended = await known.until_state(api, ROLLOUT_STATE_SUCCEEDED, going)
        assert (ended.report.reporter, ended.report.verdict) == ("judge", VERDICT_PASS)


async def test_answers_that_are_none_are_refused(traffic: Traffic) -> None:
    good = answer(label("a"), "r", 1, 1, copy=False)
    for change, field in (
        ({"model": ""}, "model"),
        ({"model": "x" * 65}, "model"),
        ({"version": 0}, "version"),
        ({"pair": ""}, "pair"),
        ({"pair": "x" * 129}, "pair"),
        ({"labels": answers_pb2.AnswerLabels(labels=["x" * 257])}, "labels"),
        ({"labels": answers_pb2.AnswerLabels(labels=["x"] * 1001)}, "labels"),
        ({"tokens": answers_pb2.AnswerTokens(digests=b"abc")}, "tokens.digests"),
        ({"vectors": vectors_of(b"abc")}, "vectors"),
        ({"vectors": vectors_of(b"ab", b"abcd")}, "vectors"),
        ({"tokens": answers_pb2.AnswerTokens(digests=b"ab" * (1 << 20))}, ""),
        ({"labels": None}, "content"),
    ):
        bad = answers_pb2.Answer()
        bad.CopyFrom(good)
        for name, value in change.items():
            if value is None:
                bad.ClearField(name)
            elif isinstance(value, str | int):
                setattr(bad, name, value)
            else:
                getattr(bad, name).CopyFrom(value)
        request = answers_pb2.ReportAnswersRequest(answers=[good, bad])
        error = await refused(traffic.report(request))
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert error.field == f"answers[1].{field}".rstrip(".")
    error = await refused(traffic.report(answers_pb2.ReportAnswersRequest(answers=[good] * 1001)))
    assert error.field == "answers"


async def test_plans_that_cannot_be_judged_are_refused(api: Api) -> None:
    nan, infinite = float("nan"), float("inf")
    for percents, shadow, field in (
        ((10,), 101, "shadow_percent"),
        ((0,), 0, "steps[0].percent"),
        ((0, 0), 5, "steps[1].percent"),
    ):
        error = await refused(start(api, *percents, shadow_percent=shadow))
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"plan.{field}")
    for name, value in (
        ("false_alarms", 0.0),
        ("false_alarms", nan),
        ("error_increase", 1.1),
        ("slowdown", 0.5),
        ("slowdown", nan),
        ("cosine_distance", -0.1),
        ("token_divergence", infinite),
        ("label_disagreement", 2.0),
        ("least", 0),
    ):
        error = await refused(start(api, 10, judgement=rollouts_pb2.Judgement(**{name: value})))
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"plan.judgement.{name}")
