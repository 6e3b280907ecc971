"""A registry that is killed in the middle of a release: it happened as a whole or not at all, and asked for
again, under its request id and elsewhere, it happens once."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial

import pytest

from lingqu.registry.v1 import models_pb2
from tests.conftest import EtcdServer
from tests.histories import invariants, truth
from tests.registries import Api, RegistryProcess, once_allowed, weights
from tests.waiting import pause

pytestmark = pytest.mark.chaos

ROUNDS_S = 10.0
INTERVAL_S = 1
MODELS = ("m1", "m2", "m3", "m4", "m5")


async def test_a_registry_killed_during_releases_leaves_all_or_nothing(etcd_server: EtcdServer) -> None:
    victim = await RegistryProcess.start(etcd_server, "victim")
    other = await RegistryProcess.start(etcd_server, "other")
    asked: list[str] = []
    try:
        await prepare(other.api)
        deadline = time.monotonic() + ROUNDS_S
        while time.monotonic() < deadline:
            asked.append(f"r{len(asked)}")
            await round_(victim, other, asked[-1], {1: 100} if len(asked) % 2 else {2: 100})
            victim = await RegistryProcess.start(etcd_server, "victim", address=victim.address)
    finally:
        await victim.stop()
        await other.stop()
    history = await truth.read(etcd_server.address)
    assert list(invariants.problems(history)) == []
    for model in MODELS:
        check_releases(history, model, asked)


def check_releases(history: truth.Truth, model: str, asked: list[str]) -> None:
    """Each release happened once, and started its cooldown in the same transaction."""
    written = [e for e in history.under(f"/lingqu/models/{model}/releases/") if e.value is not None]
    entries = [models_pb2.Release.FromString(event.value or b"") for event in written]
    assert [entry.request_id for entry in entries] == ["first", *asked]
    cooldowns = [e for e in history.under(f"/lingqu/models/{model}/cooldown") if e.value is not None]
    assert [e.revision for e in cooldowns] == [e.revision for e in written[1:]]
    assert all(e.lease for e in cooldowns)


async def prepare(api: Api) -> None:
    """Of each model two versions that are ready, and a policy by which releases keep their distance."""
    policy = models_pb2.Policy()
    policy.min_release_interval.FromSeconds(INTERVAL_S)
    for model in MODELS:
        assert (await api.create(model), await api.create(model)) == (1, 2)
        await api.host(1, 2, model=model, instance=model)
        await api.split({2: 100}, model, request_id="first")
        await api.models.SetPolicy(models_pb2.SetPolicyRequest(model=model, policy=policy), timeout=5)


async def round_(victim: RegistryProcess, other: RegistryProcess, name: str, shares: dict[int, int]) -> None:
    """Ask the victim, kill it before, while or after it answers, ask the other one at once."""
    releases = [asyncio.create_task(victim.api.split(shares, model, request_id=name)) for model in MODELS]
    await pause(random.uniform(0, 0.03), "it is killed somewhere in the middle")
    await victim.kill()
    await asyncio.gather(*releases, return_exceptions=True)
    answers = await asyncio.gather(
        *(
            once_allowed(partial(other.api.split, shares, model, request_id=name))  # as a client does it
            for model in MODELS
        )
    )
    assert [weights(answer) for answer in answers] == [shares] * len(MODELS)
