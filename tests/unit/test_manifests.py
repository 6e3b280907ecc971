"""What manifests may say, and that the registry is told all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.suite import ECHO
from lingqu.artifacts import Artifact, PublishFailed
from pipeline.package import About, Package
from pipeline.tensor import package_tensor
from services.core.discovery import Version, VersionKey
from services.core.signing import Signer, TrustedKeys
from services.inference.artifact import (
    MANIFEST,
    FileDigest,
    InvalidManifest,
    Lineage,
    Manifest,
    TensorSpec,
    unlike,
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    about = About(
        evaluation={"accuracy": 0.9},
        lineage=Lineage(parent="echo/1", source="abc"),
        labels={"team": "search"},
    )
    return package_tensor(ECHO, tmp_path_factory.mktemp("made"), about)


def test_the_record_has_what_the_manifest_says(tmp_path: Path, package: Package) -> None:
    signer = Signer.at(tmp_path / "a.pem")
    record = Artifact.at(package.folder).push(f"memory://{tmp_path}").signed(signer, "m").record("m")
    assert record.model == "m"
    assert record.artifact.uri == f"memory://{tmp_path}/{package.sha256}"
    assert record.artifact.size_bytes == package.size_bytes
    assert (record.task, record.runtime, record.golden_examples) == ("tensor", "python", 0)
    assert [(t.name, t.datatype, list(t.shape)) for t in record.signature.inputs] == [
        ("INPUT", "INT32", [-1, -1])
    ]
    assert dict(record.evaluation) == {"accuracy": 0.9}
    assert (record.lineage.parent, record.lineage.source) == ("echo/1", "abc")
    assert dict(record.labels) == {"team": "search"}
    assert Artifact.stored(record.artifact.uri).record("m").evaluation == record.evaluation
    keys = tmp_path / "k.pem"
    keys.write_bytes(signer.public_pem)
    at = record.artifact
    TrustedKeys.at(keys).verify("m", at.sha256, at.signature, at.signer)


def test_what_is_no_artifact_is_not_recorded(tmp_path: Path) -> None:
    odd = ("", "[]", "{}", '{"files": {}, "task": "t", "runtime": "r", "lineage": {"x": 1}}', '"x"')
    for text in odd:
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(PublishFailed, match="is no artifact"):
            Artifact.at(tmp_path)
    with pytest.raises(PublishFailed, match="there is no such file"):
        Artifact.stored("memory://nowhere")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_is_read_or_refused_in_one_way(package: Package, data: st.DataObject) -> None:
    """Bytes, and good manifests with a part replaced or with a byte changed."""
    raw = bytearray((package.folder / MANIFEST).read_bytes())
    kind = data.draw(st.sampled_from(["bytes", "byte", "field"]))
    if kind == "bytes":
        candidate = data.draw(st.binary(max_size=200))
    elif kind == "byte":
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        candidate = bytes(raw)
    else:
        body = json.loads(raw)
        body[data.draw(st.sampled_from([*Manifest.model_fields, "other"]))] = data.draw(json_values)
        candidate = json.dumps(body).encode()
    try:
        manifest = Manifest.parse(candidate)
    except InvalidManifest as err:
        assert str(err)  # noqa: PT017
    else:
        assert manifest.size_bytes >= 0
        assert Manifest.parse(manifest.model_dump_json().encode()) == manifest


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("evaluation", {"x": "nan"}),
        ("evaluation", {f"m{n}": 1 for n in range(65)}),
        ("evaluation", {"": 1}),
        ("labels", {"k": "v" * 257}),
        ("lineage", {"data_sha256": "zz"}),
        ("lineage", {"parent": "p" * 257}),
        ("requirements", {"engine": "about 3"}),
        ("requirements", {"fingerprint": "a b"}),
        ("signature", {"inputs": [{"name": "x", "datatype": "FLOAT"}]}),
        ("signature", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]}),
        ("files", {MANIFEST: {"sha256": "0" * 64, "size": 1}}),
        ("files", {"a": {"sha256": "0" * 64, "size": 1}, "a/b": {"sha256": "0" * 64, "size": 1}}),
        ("tensor", {"config": "config.pbtxt", "model": "elsewhere.py"}),
    ],
)
def test_a_manifest_keeps_within_bounds(package: Package, part: str, value: object) -> None:
    body = {**json.loads((package.folder / MANIFEST).read_bytes()), part: value}
    with pytest.raises(InvalidManifest):
        Manifest.parse(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("claims", "found"),
    [
        ({}, None),
        ({"golden_examples": 1}, "golden examples"),
        ({"evaluation": {"f1": 0.9}}, None),
        ({"evaluation": {"f1": 0.99}}, "f1"),
        ({"evaluation": {"accuracy": 1.0}}, "accuracy"),
        ({"runtime": "onnxruntime"}, "runtime"),
        ({"task": "embed"}, "task"),
    ],
)
def test_a_record_may_not_claim_what_the_artifact_does_not_bear_out(
    claims: dict[str, Any], found: str | None
) -> None:
    manifest = Manifest(
        task="tensor",
        runtime="python",
        files=dict.fromkeys(("config.pbtxt", "model.py"), FileDigest(sha256="0" * 64, size=1)),
        tensor=TensorSpec(config="config.pbtxt", model="model.py"),
        evaluation={"f1": 0.9},
    )
    record = Version(VersionKey("m", 1), "file:///x", "0", "tensor", "python")
    claim = unlike(replace(record, **claims), manifest)
    assert (claim is None) == (found is None)
    assert found is None or found in (claim or "")
