"""What is laid out for Triton, and what an earlier release of ours had laid out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from services.core.discovery import VersionKey
from services.inference.artifact import MANIFEST, ClassifierSpec, FileDigest, Manifest
from services.inference.repository import Repository


def artifact(folder: Path, labels: tuple[str, ...], weights: str = "w") -> tuple[Path, Manifest]:
    folder.mkdir()
    (folder / "model.onnx").write_text(weights)
    manifest = Manifest(
        task="classify",
        runtime="onnxruntime",
        files={"model.onnx": FileDigest(sha256="0" * 64, size=1)},
        classifier=ClassifierSpec(weights="model.onnx", max_tokens=8, vocabulary=9, labels=labels),
        labels={"made": weights},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder, manifest


def config(root: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((root / "m" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_encoders_have_a_bounded_queue_with_priorities(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "r", {})
    repository.add(VersionKey("m", 1), *artifact(tmp_path / "a", ("x", "y")))
    batching = config(tmp_path / "r").dynamic_batching
    assert batching.default_queue_policy.max_queue_size > 0
    assert batching.default_queue_policy.allow_timeout_override
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    assert [(t.name, list(t.dims)) for t in config(tmp_path / "r").output] == [("logits", [2])]


def test_what_an_earlier_release_laid_out_is_laid_out_anew(tmp_path: Path) -> None:
    """Its settings and its module may have other names now; several versions of a model are no obstacle."""
    one, two = artifact(tmp_path / "a", ("x", "y"), "1"), artifact(tmp_path / "b", ("x", "y"), "2")
    before = Repository(tmp_path / "r", {"kv_cache_gib": "1"})
    before.add(VersionKey("m", 1), *one)
    before.add(VersionKey("m", 2), *two)
    module = tmp_path / "r" / "m" / "1" / "model.py"
    module.write_text("from services.inference.backends.vector import TritonPythonModel\n")
    after = Repository(tmp_path / "r", {"kv_cache_gib": "2"})
    after.add(VersionKey("m", 1), *one)
    after.add(VersionKey("m", 2), *two)
    assert "backends.encoder" in module.read_text()
    assert config(tmp_path / "r").parameters["kv_cache_gib"].string_value == "2"
    assert json.loads((module.parent / MANIFEST).read_text())["task"] == "classify"


def test_versions_with_other_outputs_do_not_share_a_model(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "r", {})
    repository.add(VersionKey("m", 1), *artifact(tmp_path / "a", ("x", "y")))
    with pytest.raises(ValueError, match="another name"):
        repository.add(VersionKey("m", 2), *artifact(tmp_path / "b", ("x", "y", "z")))
