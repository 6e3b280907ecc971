"""Copies for a shadow version through a real Envoy: they arrive, say what they are, and disturb nobody."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as oip

from lingqu.inference.v1 import inference_pb2 as pb
from services.gateway import clusters
from services.gateway.clusters import SHADOW_REQUESTS
from tests.dataplane import DataPlane, FakeReplica, dataplane, model, replicas
from tests.waiting import until

Gate = tuple[DataPlane, FakeReplica, FakeReplica]


@pytest.fixture
async def gate(tmp_path: Path) -> AsyncIterator[Gate]:
    """m: all to v1 on the first replica, copies to v2 on the second."""
    async with replicas("live", "shadow") as (live, shadow), dataplane(tmp_path) as plane:
        await plane.publish(
            [live.hosting(("m", 1)), shadow.hosting(("m", 2))], [model("m", {1: 100}, 2, shadow=2)]
        )
        yield plane, live, shadow


async def test_copies_say_that_they_are_and_for_which_version(gate: Gate) -> None:
    plane, live, shadow = gate
    await plane.generate("m")
    await plane.infer("m")
    await plane.chat("m")
    await until(lambda: len(shadow.seen) == 3, "copies of all paths")
    assert [s.path for s in live.seen] == ["text", "tensor", "rest"]
    for seen in shadow.seen:
        assert (seen.model, seen.version) == ("m", "2")
        assert seen.headers["x-lingqu-shadow"] == "1"
        assert seen.headers["x-lingqu-client"] == "tester"
        assert "authorization" not in seen.headers
    for seen in live.seen:
        assert "x-lingqu-shadow" not in seen.headers
        assert seen.headers.get("x-lingqu-model-version", "1") == "1"


async def test_a_copy_is_known_to_belong_to_its_original(gate: Gate) -> None:
    """By a header that no client chooses."""
    plane, live, shadow = gate
    forged = {"x-lingqu-pair": "mine"}
    await asyncio.gather(*(plane.generate("m", **forged) for _ in range(20)), plane.chat("m"))
    await until(lambda: len(shadow.seen) == 21, "copies of all")
    originals, copies = (
        sorted(seen.headers["x-lingqu-pair"] for seen in replica.seen) for replica in (live, shadow)
    )
    assert originals == copies
    assert len(set(copies)) == 21
    assert "mine" not in copies


async def test_a_version_gets_no_copies_of_its_own_requests(gate: Gate) -> None:
    """While it is rolled out it has both, a share and copies of the rest."""
    plane, live, shadow = gate
    found = [live.hosting(("m", 1)), shadow.hosting(("m", 2))]
    await plane.publish(found, [model("m", {1: 50, 2: 50}, 2, shadow=2)])
    versions = Counter([(await plane.generate("m")).model_version for _ in range(60)])
    await until(lambda: len(shadow.seen) == versions["2"] + versions["1"], "its own, and copies of the rest")
    own = [seen for seen in shadow.seen if "x-lingqu-shadow" not in seen.headers]
    assert len(own) == versions["2"]
    assert all("x-lingqu-pair" not in seen.headers for seen in own)
    assert len(shadow.seen) == 60


async def test_who_asks_for_a_version_is_not_copied(gate: Gate) -> None:
    plane, _, shadow = gate
    await plane.generate("m@1")
    assert (await plane.generate("m@2")).model_version == "2"
    await plane.generate("m")
    await until(lambda: len(shadow.seen) == 2, "what was asked of it and one copy")
    assert [s.headers.get("x-lingqu-shadow") for s in shadow.seen] == [None, "1"]


async def test_a_stream_of_tensors_is_copied_message_by_message(gate: Gate) -> None:
    plane, _, shadow = gate
    going = asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        yield oip.ModelInferRequest(model_name="m", id="a")
        await going.wait()
        yield oip.ModelInferRequest(model_name="m", id="b")

    call = plane.tensor.ModelStreamInfer(requests(), metadata=plane.metadata, timeout=10)
    answers = aiter(call)
    assert (await anext(answers)).infer_response.model_version == "1"
    await until(lambda: len(shadow.seen) == 1, "the first message, while the stream goes on")
    going.set()
    await anext(answers)
    await until(lambda: len(shadow.seen) == 2, "the second")
    assert {s.version for s in shadow.seen} == {"2"}


@pytest.mark.parametrize("trouble", ["slow", "failing", "dead"])
async def test_what_a_shadow_does_changes_nothing_for_the_client(gate: Gate, trouble: str) -> None:
    """All requests of a crowd are answered as without a shadow; copies wait, fail, or go nowhere."""
    plane, live, shadow = gate
    if trouble == "slow":
        shadow.delay_s = 30
    elif trouble == "failing":
        shadow.error = grpc.StatusCode.INTERNAL
    else:
        await plane.publish([live.hosting(("m", 1)), dead(shadow)], [model("m", {1: 100}, 2, shadow=2)])
    began = time.monotonic()
    answers = await asyncio.gather(*(plane.generate("m") for _ in range(300)))
    took = time.monotonic() - began
    assert {(a.text, a.model_version) for a in answers} == {("live", "1")}
    tensors = await asyncio.gather(*(plane.infer("m") for _ in range(50)))
    assert {a.id for a in tensors} == {"live"}
    assert took < 10  # a client that waited for a shadow would wait for 30 s
    assert len(shadow.seen) <= SHADOW_REQUESTS * 2


def dead(replica: FakeReplica) -> Any:
    """The replica's record with ports that nobody listens on."""
    record = replica.hosting(("m", 2))
    return type(record)(
        record.id, record.service, dict.fromkeys(record.endpoints, "127.0.0.1:1"), record.models
    )


async def test_a_part_of_the_requests_can_be_copied(gate: Gate) -> None:
    plane, live, shadow = gate
    found = [live.hosting(("m", 1)), shadow.hosting(("m", 2))]
    await plane.publish(found, [model("m", {1: 100}, 2, shadow=2, shadow_percent=25)])
    await asyncio.gather(*(plane.generate("m") for _ in range(400)))
    await until(lambda: len(shadow.seen) >= 60, "about 100 copies")
    assert len(shadow.seen) < 145


async def test_a_copy_ends_by_itself_or_by_its_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy does not end with its client; so none may last for ever."""
    plane, live, shadow = gate
    monkeypatch.setattr(clusters, "SHADOW_S", 1)
    found = [live.hosting(("m", 1)), shadow.hosting(("m", 2))]
    await plane.publish(found, [model("m", {1: 100}, 2, shadow=2)])
    request = pb.GenerateRequest(model="m", prompt="x")
    call = plane.text.StreamGenerate(request, metadata=plane.metadata, timeout=10)
    await anext(aiter(call))
    await until(lambda: (live.streams, shadow.streams) == (1, 1), "both stream")
    call.cancel()
    await until(lambda: live.streams == 0, "the live stream is gone")
    assert shadow.streams == 1
    await until(lambda: shadow.streams == 0, "the copy's stream is gone, too")
