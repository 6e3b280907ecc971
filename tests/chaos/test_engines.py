"""Two Tritons on one machine, and engines that die or hang in them: what is retried does not fail, and
everything comes back by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import lingqu
from bench import suite as suites
from bench.suite import Suite
from deploy.local import layout as at
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from lingqu.registry.v1 import instances_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from pipeline.tensor import package_tensor
from services.core.discovery import VersionKey
from services.inference.processes import Processes
from tests.chaos.test_kills import Load, _read_all, processes
from tests.conftest import free_offset, show_logs
from tests.waiting import until

pytestmark = pytest.mark.chaos
ENGINE_TIMEOUT_S = 4
READY = instances_pb2.HOSTED_STATE_READY
SLOW_MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        time.sleep(2)

    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(r, "INPUT")]) for r in requests
        ]
"""


@pytest.fixture(scope="module")
async def pair() -> AsyncIterator[Suite]:
    os.environ["LINGQU_ENGINE_TIMEOUT_S"] = str(ENGINE_TIMEOUT_S)
    try:
        async with suites.running(free_offset(), "--tritons", "2") as running:
            try:
                await everywhere(running, TEXT_MODEL, VECTOR_MODEL)
                yield running
            finally:
                show_logs(running.layout)
    finally:
        del os.environ["LINGQU_ENGINE_TIMEOUT_S"]


async def held(suite: Suite) -> dict[str, dict[str, Any]]:
    """What each replica says of each model, by replica."""
    async with grpc.aio.insecure_channel(suite.layout.address(at.REGISTRY)) as channel:
        request = instances_pb2.ListInstancesRequest(service="inference")
        answer: Any = await RegistryServiceStub(channel).ListInstances(request, timeout=10)
    return {i.id: {m.model: m for m in i.models} for i in answer.instances}


async def everywhere(suite: Suite, *models: str) -> None:
    """Wait until both replicas have the models ready."""

    async def ready() -> bool:
        found = await held(suite)
        return len(found) == 2 and all(
            model in mine and mine[model].state == READY for mine in found.values() for model in models
        )

    await until(ready, f"{models} on both replicas", timeout_s=60, every_s=0.2)


def stub(suite: Suite, model: str, triton: int = 1) -> psutil.Process:
    (found,) = Processes(suite.layout.triton(triton) / "models").of(VersionKey(model, 1))
    return found


async def test_the_command_line_knows_of_both(pair: Suite) -> None:
    lingqu_command = Path(sys.executable).parent / "lingqu"

    async def said(*arguments: str) -> str:
        command = [str(lingqu_command), "--state", str(pair.layout.state), *arguments]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    status = await said("status")
    assert "triton-2" in status
    assert "MiB" in status
    assert (await said("instances")).count(f"{TEXT_MODEL}:1") == 2
    assert "sequences at once" in await said("models", "size", TEXT_MODEL)


async def test_one_of_two_tritons_is_killed_and_nobody_notices(pair: Suite) -> None:
    before = processes(pair)["triton-2"]
    load = Load(pair)
    await load.more()
    os.kill(before["pid"], signal.SIGKILL)
    await load.more()
    await load.stop()
    assert load.failures == []
    assert load.slowest_s < 10
    await until(lambda: processes(pair)["triton-2"]["restarts"] > before["restarts"], "it was started again")
    await everywhere(pair, TEXT_MODEL, VECTOR_MODEL)
    strikes = pair.layout.triton(2) / "quarantine.json"
    assert not strikes.exists(), "a killed Triton is nobody's fault"


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_an_engine_that_hangs_or_dies_ends_its_streams_and_comes_back(
    pair: Suite, number: signal.Signals
) -> None:
    victim = stub(pair, TEXT_MODEL)
    async with grpc.aio.insecure_channel(pair.layout.address(at.INFERENCE)) as channel:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="Count: 1 2 3 4 5 6 7", max_tokens=4000)
        call: Any = InferenceServiceStub(channel).StreamGenerate(request, timeout=60)
        await call.read()
        os.kill(victim.pid, number)
        begun = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_all(call)
    took = time.monotonic() - begun
    error = lingqu.LingquError(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")
    assert took < (ENGINE_TIMEOUT_S + 3 if number == signal.SIGSTOP else 3)
    async with lingqu.Client(pair.public, pair.key, timeout=30) as client:  # the other one answers meanwhile
        assert (await client.generate(TEXT_MODEL, "The canal", max_tokens=4)).usage.completion_tokens == 4

    async def replaced() -> bool:  # streams end as soon as the process does, and before anybody is told
        now = Processes(pair.layout.triton(1) / "models").of(VersionKey(TEXT_MODEL, 1))
        return bool(now) and victim.pid not in [process.pid for process in now]

    await until(replaced, "another engine runs", timeout_s=30, every_s=0.2)
    await everywhere(pair, TEXT_MODEL)
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE


async def test_a_vector_engine_that_hangs_fails_no_retried_request(pair: Suite) -> None:
    victim = stub(pair, VECTOR_MODEL)
    load = Load(pair, clients=4)
    await load.more(3)
    victim.suspend()
    await until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, "it was ended")
    await load.more(5)
    await load.stop()
    assert load.failures == []
    await everywhere(pair, VECTOR_MODEL)


async def test_tritons_killed_while_a_version_loads(pair: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "model.py").write_text(SLOW_MODEL)
    config = (Path(suites.ECHO) / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config.replace('"OUTPUT"', '"INPUT"'))
    package = package_tensor(folder, tmp_path / "made")
    publishing = asyncio.create_task(pair.publish("slow", package.folder))

    async def loading() -> bool:
        return all(
            "slow" in mine and mine["slow"].detail == "loading" for mine in (await held(pair)).values()
        )

    await until(loading, "both load it", every_s=0.02)
    for name in ("triton", "triton-2"):
        os.kill(processes(pair)[name]["pid"], signal.SIGKILL)
    assert await publishing == 1
    await everywhere(pair, "slow", TEXT_MODEL, VECTOR_MODEL)
