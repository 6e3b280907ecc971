"""kill -9 of every part under load: the supervisor heals it, and clients that retry see no failure."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import lingqu
from bench import suite as suites
from bench.suite import Suite
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from tests.conftest import free_offset, show_logs
from tests.waiting import pause, until

pytestmark = pytest.mark.chaos
PARTS = ("registry", "metrics", "gateway", "inference", "triton", "envoy", "etcd")


@pytest.fixture(scope="module")
async def victim() -> AsyncIterator[Suite]:
    """A suite of its own: nothing else should live with what happens to it."""
    async with suites.running(free_offset()) as running:
        try:
            yield running
        finally:
            show_logs(running.layout)


def processes(suite: Suite) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(suite.layout.suite_file.read_text())["parts"]
    return found


class Load:
    """Generate and Embed in turn, from several clients, until stopped; with retries, as our client does."""

    def __init__(self, suite: Suite, clients: int = 4) -> None:
        self._suite = suite
        self._stop = asyncio.Event()
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest_s = 0.0
        self._tasks = [asyncio.create_task(self._run(n)) for n in range(clients)]

    async def _run(self, number: int) -> None:
        async with lingqu.Client(self._suite.public, self._suite.key, timeout=60) as client:
            while not self._stop.is_set():
                begun = time.monotonic()
                try:
                    if number % 2:
                        await client.embed(VECTOR_MODEL, [f"text {self.done['embed']}"])
                        self.done["embed"] += 1
                    else:
                        answer = await client.generate(TEXT_MODEL, "The canal", max_tokens=8, no_cache=True)
                        assert answer.usage.completion_tokens == 8
                        self.done["generate"] += 1
                except lingqu.LingquError as error:
                    self.failures.append(f"{error.code.name}: {error}")
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)

    async def more(self, count: int = 10) -> None:
        """Wait until that many more of each have been answered."""
        goal = {name: self.done[name] + count for name in ("generate", "embed")}
        await until(
            lambda: all(self.done[name] >= number for name, number in goal.items()),
            f"{count} more answers of each kind; so far {self.done}",
            timeout_s=60,
        )

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)


@pytest.mark.parametrize("part", PARTS)
async def test_a_killed_part_comes_back_and_no_retried_request_fails(victim: Suite, part: str) -> None:
    before = processes(victim)[part]
    load = Load(victim)
    await load.more()
    os.kill(before["pid"], signal.SIGKILL)
    await until(lambda: processes(victim)[part]["restarts"] > before["restarts"], f"{part} was started again")
    await load.more()
    await load.stop()
    assert processes(victim)[part]["pid"] != before["pid"]
    assert load.failures == []


async def test_without_the_control_plane_and_the_registry_traffic_flows(victim: Suite) -> None:
    """Stopped, not killed, so that nothing heals them: Envoy and inference go on with what they know."""
    stopped = [processes(victim)[part]["pid"] for part in ("gateway", "registry", "etcd")]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        load = Load(victim)
        await load.more(30)
        await load.stop()
        assert load.failures == []
        assert load.slowest_s < 10
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    load = Load(victim)
    await load.more()
    await load.stop()
    assert load.failures == []


async def test_a_triton_that_pauses_is_not_given_up(victim: Suite) -> None:
    async with lingqu.Client(victim.public, victim.key) as client:
        pieces = []
        async for chunk in client.stream(TEXT_MODEL, "Count: 1 2 3 4 5 6 7", max_tokens=600):
            pieces.append(chunk.text)
            if len(pieces) == 3:
                group = processes(victim)["triton"]["pid"]
                os.killpg(group, signal.SIGSTOP)
                await pause(4, "longer than inference waits for an answer of Triton's")
                os.killpg(group, signal.SIGCONT)
    assert chunk.usage.completion_tokens == 600


async def test_a_stream_on_a_killed_triton_ends_with_a_retryable_error(victim: Suite) -> None:
    async with grpc.aio.insecure_channel(victim.public) as channel:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="Count: 1 2 3 4 5 6 7", max_tokens=4000)
        call: Any = InferenceServiceStub(channel).StreamGenerate(
            request, metadata=(("authorization", f"Bearer {victim.key}"),), timeout=60
        )
        await call.read()
        os.kill(processes(victim)["triton"]["pid"], signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_all(call)
    error = lingqu.LingquError(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")
    load = Load(victim, clients=2)
    await load.more(2)
    await load.stop()
    assert load.failures == []


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        continue


def alive(pids: list[int]) -> list[str]:
    """Those of `pids` that still run, with their names."""
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.name()} ({pid})")
        except psutil.NoSuchProcess:
            continue
    return found


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_however_the_suite_ends_no_process_survives(number: signal.Signals) -> None:
    async with suites.running(free_offset()) as running:
        family = descendants(running.process.pid)
        assert len(family) >= 9  # seven parts, two model processes of Triton, the guard
        async with lingqu.Client(running.public, running.key) as client:
            stream = client.stream(TEXT_MODEL, "Count: 1 2 3", max_tokens=4000)
            async for _ in stream:
                running.process.send_signal(number)
                break
            await until(lambda: not alive(family), f"all processes ended; left: {alive(family)}", 20)
        assert await running.process.wait() == (-number if number == signal.SIGKILL else 0)
        prefix = f"lingqu{8001 + running.layout.offset}_"
        await until(lambda: not list(Path("/dev/shm").glob(f"{prefix}*")), "no shared memory is left")


async def test_a_second_suite_says_who_holds_the_ports(victim: Suite, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError) as refused:
        async with suites.running(victim.layout.offset, state=tmp_path):
            pass
    said = str(refused.value)
    assert f"port {8080 + victim.layout.offset} (public) is held by envoy (pid" in said
    assert "--port-offset" in said


async def test_a_second_suite_on_the_same_state_is_refused(victim: Suite) -> None:
    with pytest.raises(ChildProcessError, match="a suite is running in"):
        async with suites.running(free_offset(), state=victim.layout.state):
            pass


async def test_what_was_published_is_there_after_a_restart(tmp_path: Path) -> None:
    offset = free_offset()
    async with suites.running(offset, state=tmp_path) as first:
        await first.publish_echo()
    # Triton did not have to give up on any of its models.
    stopped = (first.layout.logs / "triton.log").read_text()
    assert "Exit timeout expired" not in stopped
    for model in ("echo", TEXT_MODEL, VECTOR_MODEL):
        assert f"successfully unloaded '{model}'" in stopped
    async with (
        suites.running(offset, state=tmp_path) as second,
        lingqu.Client(second.public, second.key) as client,
    ):
        answer = await client.generate(TEXT_MODEL, "The canal", max_tokens=2)
        assert answer.model_version == "1"
        await until(
            lambda: "echo" in (second.layout.logs / "inference.log").read_text(), "echo is loaded again"
        )
