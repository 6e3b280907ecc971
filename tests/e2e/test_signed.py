"""A suite that demands signatures, and versions that its machine cannot run; from a store, not in place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from bench import suite as suites
from bench.suite import ECHO, Suite
from deploy.local import layout as at
from lingqu.publishing import Artifact, Publisher, PublishFailed
from pipeline.tensor import package_tensor
from services.core.signing import Signer
from tests.conftest import free_offset, show_logs


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.at(tmp_path_factory.mktemp("keys") / "signing.pem")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The echo model in a store."""
    made = tmp_path_factory.mktemp("made")
    return Artifact.at(package_tensor(ECHO, made).folder).push(f"file://{made}/a store")


@pytest.fixture(scope="module")
async def guarded(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    keys = tmp_path_factory.mktemp("trusted")
    (keys / "release.pem").write_bytes(signer.public_pem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINGQU_TRUSTED_KEYS", str(keys))
        async with suites.running(free_offset(), "--no-bundled") as running:
            try:
                yield running
            finally:
                show_logs(running.layout)


async def publish(suite: Suite, name: str, artifact: Artifact) -> int:
    async with grpc.aio.insecure_channel(suite.layout.address(at.REGISTRY)) as channel:
        return await Publisher(channel).publish(name, artifact, traffic=True, timeout_s=60, tell=print)


async def test_what_a_trusted_key_signed_is_served(
    guarded: Suite, signer: Signer, artifact: Artifact
) -> None:
    assert await publish(guarded, "signed", artifact.signed(signer, "signed")) == 1


async def test_everything_else_is_refused_with_the_reason(
    guarded: Suite, signer: Signer, artifact: Artifact, tmp_path: Path
) -> None:
    stranger = Signer.at(tmp_path / "stranger.pem")
    cases = {
        "unsigned": (artifact, "not signed"),
        "foreign": (artifact.signed(stranger, "foreign"), "not among the trusted keys"),
        "renamed": (artifact.signed(signer, "signed"), "signature is wrong"),
    }
    for name, (given, reason) in cases.items():
        # The replica says so where the registry has not.
        with pytest.raises((PublishFailed, grpc.aio.AioRpcError), match=reason):
            await publish(guarded, name, given)


async def test_what_this_machine_cannot_run_is_refused_before_it_is_fetched(
    guarded: Suite, signer: Signer, artifact: Artifact
) -> None:
    for needs, reason in (({"engine": "<3"}, "needs python <3"), ({"fingerprint": "abacus"}, '"abacus"')):
        demanding = replace(artifact, uri="file:///nowhere", about={"requirements": needs})
        with pytest.raises(PublishFailed, match=reason):
            await publish(guarded, "demanding", demanding.signed(signer, "demanding"))
