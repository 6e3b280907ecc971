"""Which of a version's replicas gets a request, through a real Envoy: what belongs together goes together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lingqu.inference.v1 import inference_pb2 as pb
from services.gateway import clusters
from tests.dataplane import DataPlane, FakeReplica, dataplane, model, replicas
from tests.waiting import pause, until

Gate = tuple[DataPlane, list[FakeReplica]]
M = ("m", 1)


@pytest.fixture(scope="module")
async def gate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gate]:
    async with replicas("a", "b", "c", "d") as hosts, dataplane(tmp_path_factory.mktemp("gate")) as plane:
        yield plane, hosts


@pytest.fixture
async def plane(gate: Gate) -> DataPlane:
    plane, hosts = gate
    for host in hosts:
        host.delay_s = 0
    await plane.publish([host.hosting(M, ("e", 1)) for host in hosts], MODELS)
    return plane


MODELS = [model("m", {1: 100}), model("e", {1: 100}, task="embed")]


async def asked(plane: DataPlane, *turns: tuple[str, str], **headers: str) -> str:
    """Which replica answers a conversation."""
    messages = [pb.Message(role=role, content=text) for role, text in turns]
    request = pb.GenerateRequest(model="m", messages=messages, temperature=0.5)
    metadata = (*plane.metadata, *((k.replace("_", "-"), v) for k, v in headers.items()))
    answer: Any = await plane.text.Generate(request, metadata=metadata, timeout=10)
    return str(answer.text)


async def test_prompts_that_begin_alike_go_to_one_replica(plane: DataPlane) -> None:
    same = "A canal joins two rivers. " * 40
    assert len({(await plane.generate("m", f"{same}{n}" + "x" * n)).text for n in range(20)}) == 1
    assert len({(await plane.generate("m", f"{n} {same}")).text for n in range(40)}) == 4


async def test_the_turns_of_a_conversation_go_to_one_replica(plane: DataPlane) -> None:
    found = Counter[str]()
    for number in range(12):
        turns = [("system", "Be kind."), ("user", f"Question {number}")]
        servers = {await asked(plane, *turns)}
        for turn in range(3):
            turns += [("assistant", f"Answer {turn}"), ("user", "And?" * turn)]
            servers.add(await asked(plane, *turns))
        assert len(servers) == 1
        found.update(servers)
    assert len(found) > 1


async def test_it_is_the_same_for_rest(plane: DataPlane) -> None:
    async def chat(*texts: str) -> str:
        roles = ("system", "user", "assistant", "user")
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        body = {"model": "m", "messages": turns, "max_tokens": len(texts)}
        return str((await plane.rest.post("/v1/chat/completions", json=body)).json()["server"])

    found = set()
    for number in range(12):
        begun = ("Be kind.", f'Say "{number}"')
        server = await chat(*begun)
        assert await chat(*begun, "Well", "And then?") == server
        found.add(server)
    assert len(found) > 1


async def test_a_session_stays_on_one_replica_whatever_it_asks(plane: DataPlane) -> None:
    found = set()
    for number in range(12):
        name = f"session-{number}"
        servers = {(await plane.generate("m", f"{n}", lingqu_session=name)).text for n in range(5)}
        servers.add((await plane.chat("m", lingqu_session=name)).json()["server"])
        found |= servers
        assert len(servers) <= 2  # REST has clusters of its own, with a ring of other addresses
    assert len(found) > 1


async def test_when_a_replica_goes_little_else_moves(gate: Gate, plane: DataPlane) -> None:
    async def all_of() -> dict[str, str]:
        return {n: (await plane.generate("m", "x", lingqu_session=n)).text for n in map(str, range(60))}

    before = await all_of()
    await plane.publish([host.hosting(M) for host in gate[1][:3]], MODELS[:1])
    after = await all_of()
    moved = {name for name in before if before[name] != after[name]}
    assert moved >= {name for name in before if before[name] == "d"}
    # The others get more points on a ring of the same size.
    assert sum(before[name] != "d" for name in moved) < 60 / 4


async def test_one_beginning_that_everybody_has_does_not_drown_its_replica(
    gate: Gate, plane: DataPlane
) -> None:
    """No replica has more than 1.5 times the mean in progress."""
    for host in gate[1]:
        host.seen.clear()
        host.delay_s = 0.5

    async def bounded() -> bool:
        answers = await asyncio.gather(*(plane.generate("m", "The same for all") for _ in range(60)))
        shares = Counter(answer.text for answer in answers)
        return len(shares) > 1 and max(shares.values()) <= 60 / 4 * 1.5 + 2

    await until(bounded, "a ring that was changed just now is complete")


async def test_without_affinity_the_least_busy_replica_is_asked(gate: Gate, plane: DataPlane) -> None:
    """One replica that is slow holds requests and so gets few."""
    for host in gate[1]:
        host.seen.clear()
    gate[1][0].delay_s = 1.0
    pending = [asyncio.create_task(plane.infer("m")) for _ in range(2)]
    for _ in range(200):
        pending.append(asyncio.create_task(plane.infer("m")))
        await pause(0.002, "one after the other, as the fast ones answer")
    answers = Counter([(await task).id for task in pending])
    assert answers["a"] < 40
    assert min(answers[name] for name in "bcd") > 30


async def test_a_replica_that_has_come_gets_its_share_slowly(
    gate: Gate, plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caches are cold: of requests that everybody has room for, it gets few at first."""
    old, new, models = gate[1][:3], gate[1][3], [model("young", {1: 100}, task="embed")]
    monkeypatch.setitem(clusters.SLOW_START, "slow_start_window", "2s")
    await plane.publish([host.hosting(("young", 1)) for host in old], models)
    await pause(2.1, "they have come long ago")
    await plane.publish([host.hosting(("young", 1)) for host in gate[1]], models)
    answers = Counter([(await plane.infer("young")).id for _ in range(60)])
    assert answers[new.name] < 60 / 4 / 2
    assert min(answers[host.name] for host in old) > 60 / 4


async def test_large_prompts_pass(plane: DataPlane) -> None:
    assert (await plane.generate("m", "x" * 2_000_000)).text
    assert (await plane.generate("m", "")).text


async def test_what_a_version_says_counts(gate: Gate, plane: DataPlane, tmp_path: Path) -> None:
    """lingqu.affinity=none: by load alone, as for models that are not for text."""
    models = [model("m", {1: 100}, labels={"lingqu.affinity": "none"})]
    await plane.publish([host.hosting(M) for host in gate[1]], models)
    names = {(await plane.generate("m", "x", lingqu_session="s")).text for _ in range(40)}
    assert len(names) > 1
