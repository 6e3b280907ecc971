"""Artifacts: fetched whole and intact, or refused by name; laid out for Triton as Triton needs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bench.suite import ECHO
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from pipeline.package import Package
from pipeline.tensor import package_tensor
from services.core.discovery import VersionKey
from services.inference.artifact import Manifest
from services.inference.repository import Repository
from services.inference.store import ArtifactRefused, Store


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return package_tensor(ECHO, tmp_path / "made")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_the_same_content_is_the_same_artifact(tmp_path: Path, package: Package) -> None:
    assert package_tensor(ECHO, tmp_path / "made").sha256 == package.sha256


def test_a_fetched_artifact_is_the_published_one(store: Store, package: Package) -> None:
    folder = store.fetch(package.uri, package.sha256)
    assert (folder / "model.py").read_bytes() == (ECHO / "model.py").read_bytes()
    assert Manifest.read(folder) == package.manifest


def test_a_changed_file_is_refused_by_name(store: Store, package: Package) -> None:
    (package.folder / "model.py").write_text("import os\n")
    with pytest.raises(ArtifactRefused, match=r"model\.py is corrupt"):
        store.fetch(package.uri, package.sha256)


def test_a_truncated_file_is_refused(store: Store, package: Package) -> None:
    raw = (package.folder / "model.py").read_bytes()
    (package.folder / "model.py").write_bytes(raw[:-1])
    with pytest.raises(ArtifactRefused, match=r"model\.py is corrupt"):
        store.fetch(package.uri, package.sha256)


def test_a_changed_manifest_is_refused(store: Store, package: Package) -> None:
    with (package.folder / "manifest.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ArtifactRefused, match=r"manifest\.json is corrupt"):
        store.fetch(package.uri, package.sha256)


def test_what_is_not_there_is_refused(store: Store, package: Package) -> None:
    shutil.rmtree(package.folder)
    with pytest.raises(ArtifactRefused, match="cannot be read"):
        store.fetch(package.uri, package.sha256)


@pytest.mark.parametrize("uri", ["nonsense://x", "s3", "file://", "http://127.0.0.1:1/x"])
def test_an_address_that_leads_nowhere_is_refused(store: Store, uri: str) -> None:
    with pytest.raises(ArtifactRefused):
        store.fetch(uri, "0" * 64)


def test_a_copy_that_was_tampered_with_is_fetched_again(store: Store, package: Package) -> None:
    folder = store.fetch(package.uri, package.sha256)
    (folder / "model.py").write_text("import os\n")
    assert (store.fetch(package.uri, package.sha256) / "model.py").read_bytes() == (
        ECHO / "model.py"
    ).read_bytes()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", ".hidden", ""])
def test_a_manifest_cannot_name_files_outside(name: str) -> None:
    with pytest.raises(ValueError, match="files"):
        Manifest.model_validate(
            {"task": "tensor", "runtime": "python", "files": {name: {"sha256": "0" * 64, "size": 1}}}
        )


@pytest.mark.parametrize("model", [TEXT_MODEL, VECTOR_MODEL])
def test_the_layout_is_what_triton_reads(tmp_path: Path, artifacts: dict[str, Path], model: str) -> None:
    repository = Repository(tmp_path / "models", {"kv_cache_gib": "1"})
    manifest = Manifest.read(artifacts[model])
    repository.add(VersionKey(model, 3), artifacts[model], manifest)
    home = tmp_path / "models" / model
    config = text_format.Parse((home / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.name == model
    assert config.model_transaction_policy.decoupled == (model == TEXT_MODEL)
    assert (home / "3" / "model.py").is_file()
    assert list((home / "3" / "__pycache__").iterdir()), "Triton would load it again when Python adds this"


def test_adding_a_version_again_touches_nothing(tmp_path: Path, package: Package) -> None:
    repository = Repository(tmp_path / "models", {})
    key = VersionKey("echo", 1)
    repository.add(key, package.folder, package.manifest)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "models").rglob("*")}
    repository.add(key, package.folder, package.manifest)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "models").rglob("*")}


def test_a_version_that_would_change_the_others_is_refused(tmp_path: Path, package: Package) -> None:
    repository = Repository(tmp_path / "models", {})
    repository.add(VersionKey("echo", 1), package.folder, package.manifest)
    before = (tmp_path / "models" / "echo" / "config.pbtxt").read_text()
    other = tmp_path / "other"
    shutil.copytree(ECHO, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "config.pbtxt").write_text((ECHO / "config.pbtxt").read_text().replace("INPUT", "Z"))
    changed = package_tensor(other, tmp_path / "made")
    with pytest.raises(ValueError, match="another name"):
        repository.add(VersionKey("echo", 2), changed.folder, changed.manifest)
    assert (tmp_path / "models" / "echo" / "config.pbtxt").read_text() == before
    assert repository.others({VersionKey("echo", 2)}) == [VersionKey("echo", 1)]


def test_a_manifest_says_only_what_its_task_needs(package: Package) -> None:
    body = package.manifest.model_dump()
    with pytest.raises(ValueError, match="embed"):
        Manifest.model_validate({**body, "task": "embed"})


def test_guesses_are_for_openvinos_own_format(artifacts: dict[str, Path]) -> None:
    body = Manifest.read(artifacts[TEXT_MODEL]).model_dump()
    text = body["text"]
    assert Manifest.model_validate({**body, "text": {**text, "guesses": 7}}).text
    changed = {**body, "files": {**body["files"], "m.gguf": body["files"][text["weights"]]}}
    with pytest.raises(ValueError, match="guesses need an openvino_model"):
        Manifest.model_validate({**changed, "text": {**text, "weights": "m.gguf", "guesses": 7}})
    assert Manifest.model_validate({**changed, "text": {**text, "weights": "m.gguf"}}).text


def test_removing_the_last_version_removes_the_model(tmp_path: Path, package: Package) -> None:
    repository = Repository(tmp_path / "models", {})
    for number in (1, 2):
        repository.add(VersionKey("echo", number), package.folder, package.manifest)
    assert repository.remove(VersionKey("echo", 2))
    assert not repository.remove(VersionKey("echo", 1))
    assert not (tmp_path / "models" / "echo").exists()
