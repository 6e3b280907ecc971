"""The agent of one Triton, with a Triton in memory: what it loads, says, gives up and tries again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench.suite import ECHO
from lingqu.cli.modelview import hosted
from pipeline.package import Package
from pipeline.tensor import package_tensor
from services.core.discovery import FAILED, LOADING, READY, Hosted, Replica, Version, VersionKey
from services.core.errors import BackendUnavailable, DeadlinePassed, InvalidInput
from services.core.records import to_instance, to_replica
from services.inference import agent as agent_module
from services.inference import golden, latency, proving, reporting, watchdog
from services.inference import store as store_module
from services.inference.agent import Agent
from services.inference.artifact import GoldenText, LatencyBudget
from services.inference.processes import STUB, Processes
from services.inference.proving import Prover
from services.inference.quarantine import Quarantine
from services.inference.repository import Repository
from services.inference.requirements import Machine
from services.inference.served import Limits
from services.inference.store import Store
from services.inference.triton import LoadFailed
from services.inference.watchdog import Pulse, Watchdog
from services.registry import validation
from tests.waiting import pause, until

KEY = VersionKey("echo", 1)


class FakeTriton:
    """Loads what lies in the repository folder, as Triton does. `on_load` may fail instead. Every version
    that it has runs as a process with the command line of Triton's stub."""

    def __init__(self, repository: Path) -> None:
        self._root = repository
        self.processes: dict[VersionKey, subprocess.Popen[bytes]] = {}
        self.loads: list[str] = []
        self.alive = True
        self.slow = False
        self.on_load: Callable[[str], None] = lambda model: None

    async def ready_versions(self) -> set[VersionKey]:
        if self.slow:
            raise DeadlinePassed("slow")
        if not self.alive:
            raise BackendUnavailable("gone")
        return set(self.processes)

    async def load(self, model: str) -> None:
        self.loads.append(model)
        await asyncio.sleep(0)
        self.on_load(model)
        laid_out = {
            VersionKey(model, int(p.name)) for p in (self._root / model).iterdir() if p.name.isdigit()
        }
        for key in laid_out - set(self.processes):
            path = self._root / model / str(key.version) / "model.py"
            # Anything that waits: `tail -f model.py`, under the stub's name.
            self.processes[key] = subprocess.Popen(
                [STUB, str(path), "-f"], executable=shutil.which("tail"), stdout=subprocess.DEVNULL
            )
        for key in [k for k in self.processes if k.model == model and k not in laid_out]:
            self.end(key)

    async def unload(self, model: str) -> None:
        for key in [k for k in self.processes if k.model == model]:
            self.end(key)

    def end(self, key: VersionKey) -> None:
        process = self.processes.pop(key)
        process.kill()
        process.wait()

    def die(self) -> None:
        self.alive = False
        for key in list(self.processes):
            self.end(key)

    def new_pulse(self, key: VersionKey) -> Pulse:
        return Pulse()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the agent called {name}")


class Lab:
    """An agent at work on `wanted`; `said` is everything it announced of KEY."""

    def __init__(self, home: Path, package: Package, **options: Any) -> None:
        self.triton = FakeTriton(home / "triton" / "models")
        self.version = Version(KEY, package.uri, package.sha256, "tensor", "python")
        self.wanted = [self.version]
        self.changed = asyncio.Event()
        self.said: list[Hosted] = []
        repository = Repository(home / "triton" / "models", {})
        timeout = options.pop("engine_timeout_s", 30.0)
        self.agent = Agent(
            self.triton,  # type: ignore[arg-type]
            Store(home / "store"),
            repository,
            Limits(8, 1 << 20, timeout),
            Machine.here(),
            lambda hosted: self.said.extend(h for h in hosted if h.key == KEY),
            **options,
        )

    @property
    def now(self) -> Hosted:
        return self.said[-1]

    async def until(self, state: int) -> Hosted:
        await until(lambda: self.said and self.now.state == state, f"state {state}; said: {self.said[-5:]}")
        return self.now


@asynccontextmanager
async def at_work(home: Path, package: Package, **options: Any) -> AsyncIterator[Lab]:
    lab = Lab(home, package, **options)
    running = asyncio.create_task(lab.agent.run(lambda: lab.wanted, lab.changed))
    try:
        yield lab
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await lab.agent.close()
        lab.triton.die()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_tensor(ECHO, tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "POLL_S", 0.02)
    monkeypatch.setattr(agent_module, "LEAVE_S", 0.0)
    monkeypatch.setattr(watchdog, "ILL_S", 0.2)
    monkeypatch.setattr(reporting, "EVERY_S", 0.0)


async def test_a_version_is_loaded_announced_and_taken_off(tmp_path: Path, package: Package) -> None:
    async with at_work(tmp_path, package) as lab:
        await lab.until(READY)
        assert next(h.detail for h in lab.said if h.state == LOADING) == ""
        assert "loading" in [h.detail for h in lab.said]
        lab.wanted = []
        await until(lambda: not lab.triton.processes, "unloaded")
        assert not lab.agent.served


async def test_a_killed_process_is_noticed_and_the_version_comes_back(
    tmp_path: Path, package: Package
) -> None:
    """Triton goes on saying READY of it."""
    async with at_work(tmp_path, package) as lab:
        await lab.until(READY)
        before = lab.triton.processes[KEY]
        lab.said.clear()
        before.kill()
        await lab.until(READY)
        assert "its process in Triton ended; loading it again" in [h.detail for h in lab.said]
        assert lab.triton.processes[KEY].pid != before.pid
        assert lab.triton.processes[KEY].poll() is None


async def test_one_that_keeps_dying_is_quarantined_also_after_a_restart(
    tmp_path: Path, package: Package
) -> None:
    async with at_work(tmp_path, package) as lab:
        for _ in range(3):
            await lab.until(READY)
            lab.said.clear()
            lab.triton.processes[KEY].kill()
            await until(lambda: lab.said, "noticed")
        refused = await lab.until(FAILED)
        assert "quarantined: it brought its engine down 3 times" in refused.detail
        assert "LINGQU_FORGET_QUARANTINE" in refused.detail
        assert not refused.will_retry
        loads = len(lab.triton.loads)
    async with at_work(tmp_path, package) as again:
        assert "quarantined" in (await again.until(FAILED)).detail
        assert not again.triton.loads
        again.wanted = []  # retired …
        await until(lambda: not again.agent._states and not again.agent._leaving, "gone")
        again.wanted = [again.version]  # … and restored
        await again.until(READY)
    assert loads >= 3


async def test_another_artifact_under_the_same_number_is_not_quarantined(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.json")
    one = Version(KEY, "file:///a", "a" * 64, "tensor", "python")
    other = Version(KEY, "file:///b", "b" * 64, "tensor", "python")
    for _ in range(3):
        assert quarantine.loading(one) is None
        quarantine.strike(one, "it died")
    assert "it died" in (quarantine.loading(one) or "")
    assert quarantine.loading(other) is None
    assert "3 times" in (Quarantine(tmp_path / "q.json").loading(one) or "")
    Quarantine(tmp_path / "q.json").forget_all()
    assert Quarantine(tmp_path / "q.json").loading(one) is None


def test_crashes_long_after_a_load_or_long_ago_do_not_count(tmp_path: Path) -> None:
    now = 1000.0
    quarantine = Quarantine(tmp_path / "q.json", lambda: now)
    version = Version(KEY, "file:///a", "a" * 64, "tensor", "python")
    for _ in range(5):
        assert quarantine.loading(version) is None
        now += 601
        quarantine.strike(version, "late")
    for _ in range(5):
        assert quarantine.loading(version) is None
        quarantine.strike(version, "soon, but rarely")
        now += 1900
    assert quarantine.loading(version) is None


@pytest.mark.parametrize("content", ["", "nonsense", "[]", '{"a": 1}', '{"a": [["x", "y"]]}'])
def test_a_spoilt_file_of_strikes_quarantines_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "q.json").write_text(content)
    version = Version(KEY, "file:///a", "a" * 64, "tensor", "python")
    quarantine = Quarantine(tmp_path / "q.json")
    assert quarantine.loading(version) is None
    quarantine.strike(version, "x")


async def test_a_triton_that_dies_takes_no_strikes(tmp_path: Path, package: Package) -> None:
    async with at_work(tmp_path, package) as lab:
        for _ in range(5):
            await lab.until(READY)
            lab.triton.die()
            await lab.until(LOADING)
            lab.triton.alive = True
        await lab.until(READY)
        assert not (tmp_path / "triton" / "quarantine.json").exists()


async def test_a_version_that_takes_triton_down_while_it_loads_is_quarantined(
    tmp_path: Path, package: Package
) -> None:
    async with at_work(tmp_path, package) as lab:

        def crash(model: str) -> None:
            asyncio.get_running_loop().call_later(0.1, lambda: setattr(lab.triton, "alive", True))
            lab.triton.die()
            raise BackendUnavailable("Triton went away while loading")

        lab.triton.on_load = crash
        refused = await lab.until(FAILED)
        assert "Triton ended while it was loaded" in refused.detail
        assert len(lab.triton.loads) == 3


async def test_what_does_not_load_is_refused_once(tmp_path: Path, package: Package) -> None:
    async with at_work(tmp_path, package) as lab:

        def refuse(model: str) -> None:
            raise LoadFailed("no such device")

        lab.triton.on_load = refuse
        assert "no such device" in (await lab.until(FAILED)).detail
        assert not lab.triton.processes


async def test_a_text_model_that_cannot_be_read_leaves_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template with a mistake, a tokenizer that is none."""
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    def unreadable(*_arguments: object) -> None:
        raise ValueError("unexpected end of template")

    monkeypatch.setattr(proving, "Session", lambda *_: SimpleNamespace(close=close))
    monkeypatch.setattr(proving, "TextModel", unreadable)
    monkeypatch.setattr(proving.estimate, "of", lambda *_: SimpleNamespace(kv=None))
    nothing: Any = None
    prover = Prover(nothing, "secret", Limits(max_sequences=1), nothing)
    manifest: Any = SimpleNamespace(text=object())
    with pytest.raises(ValueError, match="end of template"):
        await prover.proven(KEY, tmp_path, manifest)
    assert closed.is_set()


async def test_what_cannot_fit_is_refused_with_figures(tmp_path: Path, package: Package) -> None:
    async with at_work(tmp_path, package, available_bytes=lambda: 10 << 20) as lab:
        refused = await lab.until(FAILED)
        assert "it needs 60 MiB of memory (engine 60 MiB), and 10 MiB are available here" in refused.detail
        assert not lab.triton.loads


async def test_a_truncated_artifact_is_never_loaded(tmp_path: Path, package: Package) -> None:
    shutil.copytree(package.folder, tmp_path / "cut")
    code = tmp_path / "cut" / "model.py"
    code.write_bytes(code.read_bytes()[:-10])
    async with at_work(tmp_path, package) as lab:
        lab.wanted = []
        await until(lambda: not lab.triton.processes, "nothing")
        lab.said.clear()
        lab.wanted = [
            Version(VersionKey("echo", 1), f"file://{tmp_path}/cut", package.sha256, "tensor", "python")
        ]
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        refused = await lab.until(FAILED)
        assert "model.py is corrupt" in refused.detail
        assert READY not in {h.state for h in lab.said}


async def test_a_silent_engine_is_ended_and_loaded_again(tmp_path: Path, package: Package) -> None:
    pulse = Pulse()
    async with at_work(tmp_path, package, engine_timeout_s=0.3) as lab:
        pulses = iter([pulse])
        lab.triton.new_pulse = lambda key: next(pulses, None) or Pulse()  # type: ignore[method-assign]
        await lab.until(READY)
        before = lab.triton.processes[KEY]
        lab.said.clear()
        with pulse:  # a request that is not answered
            await until(lambda: before.poll() is not None, "the hung process was ended")
        await lab.until(READY)
        assert any("it has not answered for 0 s" in h.detail for h in lab.said)


async def test_a_triton_that_answers_nothing_is_ended(tmp_path: Path, package: Package) -> None:
    """For who looks after it to start another."""
    hung = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dog = Watchdog(Processes(tmp_path), 0.2)
    dog._triton = psutil.Process(hung.pid)
    dog.heard(False)
    dog.heard(True)
    dog.heard(False)
    await pause(0.1, "half of what it may be silent for")
    dog.heard(False)
    assert hung.poll() is None, "it was heard of in between"
    await pause(0.2, "all of it")
    dog.heard(False)
    await asyncio.wait_for(asyncio.to_thread(hung.wait), 5)


async def test_how_far_a_fetch_is_is_told_but_not_too_often() -> None:
    told: list[tuple[str, float]] = []
    progress = reporting.fetching(lambda text, share: told.append((text, share)), every_s=0.0)
    await asyncio.to_thread(progress, 43 << 20, 98 << 20)
    await asyncio.sleep(0)
    assert told == [("fetching 43 of 98 MiB", 43 / 98)]
    seldom = reporting.fetching(lambda text, share: told.append((text, share)), every_s=60.0)
    for done in range(1000):
        seldom(done << 20, 1000 << 20)
    await asyncio.sleep(0)
    assert len(told) == 1


async def test_an_engine_that_triton_calls_ill_is_replaced(tmp_path: Path, package: Package) -> None:
    pulse = Pulse()
    async with at_work(tmp_path, package) as lab:
        lab.triton.new_pulse = lambda key: pulse  # type: ignore[method-assign]
        await lab.until(READY)
        before = lab.triton.processes[KEY]
        lab.said.clear()
        pulse.complain()
        pulse.heard()
        await pause(0.3, "once may be a busy machine, if it goes on")
        assert before.poll() is None
        pulse.complain()
        await until(lambda: before.poll() is not None, "it was ended")
        lab.triton.new_pulse = lambda key: Pulse()  # type: ignore[method-assign]
        await lab.until(READY)
        assert not (tmp_path / "triton" / "quarantine.json").exists(), "nobody knows whose fault it was"


def test_who_stops_waiting_is_no_sign_of_life() -> None:
    now = 0.0
    pulse = Pulse(lambda: now)
    assert pulse.silent_s == 0
    with pulse:
        now = 5.0
        with pulse:
            now = 6.0
        assert pulse.silent_s == 6
        pulse.heard()
        now = 7.0
        assert pulse.silent_s == 1
    assert pulse.silent_s == 0


async def test_a_disk_that_is_full_is_said_and_tried_again(
    tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "RETRY_S", 0.1)
    room = store_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: room._replace(free=0))
    async with at_work(tmp_path, package) as lab:
        full = await lab.until(FAILED)
        assert "the disk is full" in full.detail
        assert full.will_retry
        assert not lab.triton.loads
        monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: room)
        await lab.until(READY)


async def test_too_slow_is_refused_with_figures() -> None:
    budget = LatencyBudget(first_token_ms=50, per_token_ms=5)
    assert latency.exceeded(latency.Latency(40, 4), budget) is None
    assert latency.exceeded(latency.Latency(40, 400), LatencyBudget()) is None
    text = latency.exceeded(latency.Latency(61.2, 7.0), budget) or ""
    assert "the first token took 61.2 ms, 50 ms are allowed; a token took 7.0 ms, 5 ms are allowed" in text


class SlowSession:
    """Takes 30 ms for the first token and 5 ms for each other, except the first time: then it warms up."""

    def __init__(self) -> None:
        self.calls = 0

    async def generate(self, prompt: list[int], sampling: Any) -> AsyncIterator[Any]:
        self.calls += 1
        await pause(0.5 if self.calls == 1 else 0.03, "the time to the first token")
        for token in (7, 8, 9):
            yield SimpleNamespace(tokens=(token,))
            await pause(0.005, "the time of a token")


@pytest.mark.parametrize(
    ("first_ms", "token_ms", "passes"), [(200, 50, True), (10, 50, False), (200, 1, False)]
)
async def test_the_budget_is_held_against_warm_golden_examples(
    first_ms: float, token_ms: float, passes: bool
) -> None:
    model: Any = SimpleNamespace(session=SlowSession())
    example = GoldenText(prompt="x", prompt_ids=(1,), token_ids=(7, 8, 9))
    manifest: Any = SimpleNamespace(
        text=None,
        golden_texts=(example,),
        latency_budget=LatencyBudget(first_token_ms=first_ms, per_token_ms=token_ms),
    )
    if passes:
        await golden.check_text(model, manifest)
    else:
        with pytest.raises(golden.TooSlow, match=r"ms are allowed"):
            await golden.check_text(model, manifest)
    assert model.session.calls == 1 + latency.TRIES


def test_progress_reaches_the_registry_and_the_command_line() -> None:
    told = Hosted(KEY, LOADING, "fetching 43 of 98 MiB", progress=0.44)
    record = to_instance(Replica("r", "inference", models=(told,)))
    (back,) = to_replica(record).models
    assert (back.detail, round(back.progress, 2)) == (told.detail, 0.44)
    assert hosted(record.models[0]) == "echo:1 (loading 44 %)"
    assert hosted(to_instance(Replica("r", "i", models=(Hosted(KEY, READY),))).models[0]) == "echo:1"
    validation.instance(record)
    record.models[0].progress = float("nan")
    with pytest.raises(InvalidInput, match="progress"):
        validation.instance(record)
