"""What a version needs, and what this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.suite import ECHO
from pipeline.bundled import runs_here
from pipeline.tensor import package_tensor
from services.core.discovery import Requirements
from services.inference import artifact
from services.inference.requirements import Machine, fingerprint, same_minor, unmet

HERE = Machine({"onnxruntime": "1.31.1", "openvino-genai": "2026.4.1.0"}, "cpu-x86_64-avx2")


@pytest.mark.parametrize(
    ("engine", "runtime"),
    [
        ("", "onnxruntime"),
        ("", "unheard-of"),
        (">=1.31,<1.32", "onnxruntime"),
        (">=2026.4,<2026.5", "openvino-genai"),
    ],
)
def test_what_is_here_will_do(engine: str, runtime: str) -> None:
    assert unmet(Requirements(engine), runtime, HERE) is None
    assert unmet(Requirements(engine, "cpu-x86_64-avx2"), runtime, HERE) is None


@pytest.mark.parametrize(
    ("needs", "names"),
    [
        (Requirements("<1.31"), ["<1.31", "1.31.1"]),
        (Requirements("not a version"), ["not a version"]),
        (Requirements("", "cpu-aarch64"), ["cpu-aarch64", "cpu-x86_64-avx2"]),
    ],
)
def test_what_is_missing_is_named_together_with_what_is_here(needs: Requirements, names: list[str]) -> None:
    reason = unmet(needs, "onnxruntime", HERE)
    assert reason is not None
    assert all(name in reason for name in names)


def test_an_engine_that_is_not_installed_is_named() -> None:
    assert "has none" in (unmet(Requirements(">=1"), "vllm", HERE) or "")


def test_this_machine_has_what_the_pipeline_asks_for() -> None:
    here = Machine.here()
    for runtime in ("onnxruntime", "openvino-genai"):
        assert same_minor(runtime)
        assert unmet(Requirements(same_minor(runtime), here.fingerprint), runtime, here) is None


def test_bundled_models_are_made_anew_for_new_engines(tmp_path: Path) -> None:
    manifest = package_tensor(ECHO, tmp_path).manifest
    assert runs_here(manifest)
    assert not runs_here(manifest.model_copy(update={"requirements": artifact.Requirements(engine="<3")}))


def test_the_fingerprint_names_what_the_engines_look_at(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx2 rdtscp\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert fingerprint(info).endswith("-avx2-avx512f")
    assert fingerprint(info) == fingerprint(info)
    assert fingerprint(tmp_path / "no").startswith("cpu-")
    assert len(fingerprint()) <= 200
