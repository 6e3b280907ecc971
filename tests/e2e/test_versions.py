"""Versions of models on a running suite: loading, releasing, splitting, going back."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

import lingqu
from bench.suite import Suite
from lingqu.publishing import Artifact, Publisher
from lingqu.registry.v1 import models_pb2
from pipeline.bundled import VECTOR_MODEL
from pipeline.tensor import package_tensor
from services.core.registry import Registry
from services.inference.artifact import Manifest
from tests.tensors import CONFIG, MODEL, made, pair, version_of
from tests.waiting import until


@pytest.fixture
def client(suite: Suite) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(suite.public) as client:
        yield client


@pytest.fixture
def headers(suite: Suite) -> dict[str, str]:
    return {"authorization": f"Bearer {suite.key}"}


def versions_seen(client: triton.InferenceServerClient, headers: dict[str, str], **request: Any) -> set[int]:
    """What ten unary requests and ten on one stream are answered by."""
    seen = {version_of(client.infer("v", pair(), headers=headers, **request)) for _ in range(10)}
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
    for _ in range(10):
        client.async_stream_infer("v", pair(), **request)
    for _ in range(10):
        answer = answers.get(timeout=10)
        assert not isinstance(answer, Exception), answer
        seen.add(version_of(answer))
    client.stop_stream()
    return seen


async def test_a_new_version_takes_traffic_when_it_is_given_and_not_before(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    """Also for requests that name no version, which Triton would answer with the newest."""
    registry = Registry(suite.layout.address(8082))

    async def give_traffic(version: int) -> None:
        request = models_pb2.SetTrafficRequest(model="v", version=version)
        await registry.models.SetTraffic(request, timeout=5)

    await suite.publish("v", made(tmp_path, 1).folder)
    await until(lambda: _answers(client, headers), "version 1 is routed")
    failures: list[Exception] = []
    seen: list[int] = []
    done = asyncio.Event()

    async def load() -> None:
        with triton.InferenceServerClient(suite.public) as own:
            while not done.is_set():
                try:
                    answer = await asyncio.to_thread(own.infer, "v", pair(), headers=headers)
                    seen.append(version_of(answer))
                except InferenceServerException as err:
                    failures.append(err)

    loading = asyncio.create_task(load())
    await suite.publish("v", made(tmp_path, 2).folder, traffic=False)
    assert await asyncio.to_thread(versions_seen, client, headers) == {1}
    assert await asyncio.to_thread(versions_seen, client, headers, model_version="2") == {2}
    assert set(seen) == {1}
    await give_traffic(2)
    await until(lambda: seen[-1] == 2, "version 2 takes the traffic", timeout_s=1)
    assert await asyncio.to_thread(versions_seen, client, headers) == {2}
    await give_traffic(1)
    await until(lambda: seen[-1] == 1, "and back", timeout_s=1)
    assert await asyncio.to_thread(versions_seen, client, headers) == {1}
    done.set()
    await loading
    await registry.close()
    assert [str(failure) for failure in failures] == []
    assert len(seen) > 20


def _answers(client: triton.InferenceServerClient, headers: dict[str, str]) -> bool:
    try:
        client.infer("v", pair(), headers=headers)
    except InferenceServerException:
        return False
    return True


async def test_a_corrupt_artifact_is_refused_and_never_loaded(suite: Suite, tmp_path: Path) -> None:
    package = made(tmp_path, 77)
    (package.folder / "model.py").write_text("raise SystemExit('ran code that nobody signed for')\n")
    with pytest.raises(lingqu.publishing.PublishFailed, match=r"model\.py is corrupt"):
        await suite.publish("corrupt", package.folder)  # found before anything is registered
    whole = Artifact(package.uri, package.sha256, package.size_bytes, "tensor", "python")
    async with grpc.aio.insecure_channel(suite.layout.address(8082)) as channel:
        with pytest.raises(lingqu.publishing.PublishFailed, match=r"model\.py is corrupt"):
            await Publisher(channel).publish("corrupt", whole, traffic=True, timeout_s=30, tell=print)
    with triton.InferenceServerClient(suite.triton) as direct:
        index = direct.get_model_repository_index()
    assert "corrupt" not in {model.name for model in index.models}


async def test_a_version_that_does_not_load_leaves_the_one_before_alone(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    await suite.publish("fragile", made(tmp_path, 1).folder)
    broken = made(tmp_path, 2, "raise RuntimeError('no such device')\n")
    with pytest.raises(lingqu.publishing.PublishFailed, match="no such device"):
        await suite.publish("fragile", broken.folder)
    answer = await asyncio.to_thread(client.infer, "fragile", pair(), headers=headers)
    assert version_of(answer) == 1


async def test_whatever_is_wrong_with_a_version_harms_no_other(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    await suite.publish("sound", made(tmp_path, 1).folder)
    broken = {
        "misspelt configuration": ("config.pbtxt", CONFIG.replace("max_batch_size", "max_bach_size")),
        "other inputs": ("config.pbtxt", CONFIG.replace("INPUT", "Z")),
        "no Python": ("model.py", "def ("),
    }
    for number, (name, content) in enumerate(broken.values(), 2):
        folder = tmp_path / f"broken{number}"
        folder.mkdir()
        (folder / "config.pbtxt").write_text(CONFIG)
        (folder / "model.py").write_text(MODEL.format(version=number))
        (folder / name).write_text(content)
        with pytest.raises(lingqu.publishing.PublishFailed, match="refused by every replica"):
            await suite.publish("sound", package_tensor(folder, tmp_path / "made").folder)
        answer = await asyncio.to_thread(client.infer, "sound", pair(), headers=headers)
        assert version_of(answer) == 1


async def test_a_version_that_answers_wrongly_is_refused(
    suite: Suite, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """The golden vectors are exchanged: all is intact, but it is not the model that was judged."""
    from pipeline.package import seal

    manifest = Manifest.read(artifacts[VECTOR_MODEL])
    first, second, *rest = manifest.golden_vectors
    swapped = (
        first.model_copy(update={"vector": second.vector}),
        second.model_copy(update={"vector": first.vector}),
        *rest,
    )
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in manifest.files:
        (staging / name).symlink_to(artifacts[VECTOR_MODEL] / name)
    package = seal(staging, manifest.model_copy(update={"golden_vectors": swapped}), tmp_path / "made")
    with pytest.raises(lingqu.publishing.PublishFailed, match="golden example"):
        await suite.publish("impostor", package.folder)
    async with lingqu.Client(suite.public, suite.key) as client:
        with pytest.raises(lingqu.LingquError) as caught:
            await client.embed("impostor", ["x"])
    assert caught.value.code == grpc.StatusCode.NOT_FOUND


async def lingqu_cli(suite: Suite, *arguments: str, fails: bool = False) -> str:
    """The output of a command; what it says of a failure if it is to fail."""
    command = [str(Path(sys.executable).parent / "lingqu"), "--state", str(suite.layout.state), *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


async def test_releases_by_the_command_line(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    """Publish, split, promote, roll back, retire: requests follow, and none fails."""
    for number in (1, 2, 3):
        folder = str(made(tmp_path, number).folder)
        more = ["--no-traffic"] if number > 1 else []
        store = ["--store", f"file://{tmp_path}/store"] if number == 2 else []
        await lingqu_cli(suite, "models", "publish", "gov", folder, *more, *store)

    async def seen(count: int = 200) -> Counter[int]:
        def one() -> int:
            while True:
                try:
                    return version_of(client.infer("gov", pair(), headers=headers))
                except InferenceServerException as err:  # what Triton says of any process on a busy machine
                    if "is not healthy" not in str(err):
                        raise

        def ask() -> Counter[int]:
            return Counter(one() for _ in range(count))

        return await asyncio.to_thread(ask)

    async def only(number: int) -> bool:
        return set(await seen(10)) == {number}

    await until(lambda: only(1), "version 1 has all")
    assert "they add up to 101" in await lingqu_cli(
        suite, "models", "traffic", "gov", "1=90", "2=11", fails=True
    )
    await lingqu_cli(suite, "models", "traffic", "gov", "1=70", "2=30", "--reason", "a try")

    async def both() -> bool:
        return set(await seen(40)) == {1, 2}

    await until(both, "both versions answer")
    share = (await seen(400))[2] / 400
    assert 0.2 < share < 0.4, "0.3, and five standard deviations are 0.11"
    # The first version is neither the newest nor in the traffic after this: it is taken off.
    await lingqu_cli(suite, "models", "promote", "gov", "3")
    await until(lambda: only(3), "version 3 has all")
    await lingqu_cli(suite, "models", "rollback", "gov", "--reason", "no good")
    await until(both, "the split is back")
    told = json.loads(await lingqu_cli(suite, "models", "history", "gov", "-o", "json"))
    assert [(r["kind"], r["reason"], r["actor"]) for r in told[:3]] == [
        ("RELEASE_KIND_ROLLBACK", "no good", "dev"),
        ("RELEASE_KIND_PROMOTE", "", "dev"),
        ("RELEASE_KIND_SET_TRAFFIC", "a try", "dev"),
    ]
    await lingqu_cli(suite, "models", "promote", "gov", "2")
    await lingqu_cli(suite, "models", "promote", "gov", "3")

    async def unloaded() -> bool:
        replicas = await lingqu_cli(suite, "instances")
        return "gov:1" not in replicas and "gov:3" in replicas

    await until(unloaded, "version 1, which nobody asks for, is unloaded", every_s=0.5)
    # An old version is loaded and proven again before it takes the traffic.
    await lingqu_cli(suite, "models", "promote", "gov", "1")
    await until(lambda: only(1), "version 1 is back")
    await lingqu_cli(suite, "models", "retire", "gov", "2")
    assert "is retired" in await lingqu_cli(
        suite, "models", "promote", "gov", "2", "--timeout", "2", fails=True
    )


async def test_a_rollout_moves_real_traffic(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    await suite.publish("rolled", made(tmp_path, 1).folder)
    await suite.publish("rolled", made(tmp_path, 2).folder, traffic=False)
    await lingqu_cli(
        suite, "rollouts", "start", "rolled", "2", "--step", "50:1h", "--guard", "error_rate<=0.02@10"
    )

    def versions() -> set[int]:
        return {version_of(client.infer("rolled", pair(), headers=headers)) for _ in range(30)}

    await until(lambda: versions() == {1, 2}, "both answer")
    await lingqu_cli(suite, "rollouts", "verdict", "rolled", "--figure", "error_rate=0.5", "--samples", "10")
    await until(lambda: versions() == {1}, "back at once", timeout_s=5)
    assert "error_rate is 0.5" in await lingqu_cli(suite, "rollouts", "show", "rolled")


async def test_a_placement_that_fits_no_replica_takes_off_what_does_not_serve(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    await suite.publish("placed", made(tmp_path, 1).folder)
    await suite.publish("placed", made(tmp_path, 2).folder, traffic=False)
    await lingqu_cli(suite, "models", "placement", "placed", "--label", "zone=moon")

    async def hosted(version: int) -> bool:
        return f"placed:{version}" in await lingqu_cli(suite, "instances")

    async def gone() -> bool:
        return not await hosted(2)

    await until(gone, "the candidate is taken off", every_s=0.5)
    assert await hosted(1), "nobody could take it over"
    assert version_of(client.infer("placed", pair(), headers=headers)) == 1
    await lingqu_cli(suite, "models", "placement", "placed", "--label", "")
    await until(lambda: hosted(2), "it is loaded again", every_s=0.5)


async def test_a_backup_of_a_suite_is_a_whole_file(suite: Suite, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    await lingqu_cli(suite, "registry", "backup", str(file))
    assert "is there already" in await lingqu_cli(suite, "registry", "backup", str(file), fails=True)
    assert "--overwrite" in await lingqu_cli(suite, "registry", "restore", "--help")
    assert "overwrite" in await lingqu_cli(suite, "registry", "restore", str(file), fails=True)
    lines = file.read_text().splitlines()
    cut, changed = tmp_path / "cut", tmp_path / "changed"
    cut.write_text("\n".join(lines[:-1]))
    changed.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    for wrong in (cut, changed, Path(__file__)):
        said = await lingqu_cli(suite, "registry", "restore", str(wrong), "--overwrite", fails=True)
        assert "is corrupt" in said or "is no backup" in said


async def test_clients_by_the_command_line(suite: Suite) -> None:
    await lingqu_cli(suite, "clients", "set", "alice", "--model", "smol*", "--requests-per-second", "5")
    await lingqu_cli(suite, "clients", "set", "alice", "--tokens-per-day", "1000")
    shown = json.loads(await lingqu_cli(suite, "clients", "show", "alice", "-o", "json"))
    assert shown["models"] == ["smol*"]
    assert (shown["limits"]["requests_per_second"], shown["limits"]["tokens_per_day"]) == (5, "1000")
    await lingqu_cli(suite, "clients", "delete", "alice")
    assert "no client" in await lingqu_cli(suite, "clients", "show", "alice", fails=True)
