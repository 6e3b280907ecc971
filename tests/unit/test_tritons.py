"""Several Tritons on one machine: their ports, folders and shares of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local.hardware import Share, share
from deploy.local.layout import Layout
from deploy.local.parts import Options, parts


def test_the_first_keeps_the_contracts_ports_and_no_two_share_any(tmp_path: Path) -> None:
    found = {part.name: part for part in parts(Layout(tmp_path), Options(tritons=8))}
    assert set(found["triton"].ports) == {8000, 8001, 8002}
    assert set(found["inference"].ports) >= {8083}
    assert set(found["triton-2"].ports) == {9000, 9001, 9002}
    ports = [port for part in found.values() for port in part.ports]
    assert len(ports) == len(set(ports))
    assert found["inference-2"].needs == ("registry", "triton-2")
    assert found["inference-2"].env["LINGQU_TRITON"] == "127.0.0.1:9001"


def test_folders_are_their_own_but_artifacts_are_shared(tmp_path: Path) -> None:
    found = {part.name: part for part in parts(Layout(tmp_path), Options(tritons=2))}
    one, two = found["inference"].env, found["inference-2"].env
    assert one["LINGQU_ARTIFACTS"] == two["LINGQU_ARTIFACTS"]
    assert one["LINGQU_MODEL_REPOSITORY"] != two["LINGQU_MODEL_REPOSITORY"]
    assert found["triton"].leftovers != found["triton-2"].leftovers


def test_one_alone_is_as_it_always_was(tmp_path: Path) -> None:
    names = [part.name for part in parts(Layout(tmp_path), Options())]
    assert names == ["etcd", "triton", "registry", "metrics", "gateway", "inference", "envoy"]


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """Two memory nodes with processors, one without, two GPUs."""
    for node, processors in (("node0", "0-3"), ("node1", "4-7"), ("node2", "")):
        (tmp_path / "node" / node).mkdir(parents=True)
        (tmp_path / "node" / node / "cpulist").write_text(processors + "\n")
    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / gpu).mkdir(parents=True)
    return tmp_path / "node", tmp_path / "gpus"


def test_each_gets_a_gpu_in_turn(machine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, gpus = machine
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share(n, 3, nodes, gpus).env["CUDA_VISIBLE_DEVICES"] for n in (1, 2, 3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share(n, 3, nodes, gpus).env["CUDA_VISIBLE_DEVICES"] for n in (1, 2, 3)] == ["5", "7", "5"]


def test_without_gpus_each_gets_a_memory_node(
    machine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deploy.local.hardware.shutil.which", lambda name: f"/bin/{name}")
    none = tmp_path / "none"
    found = [share(n, 3, machine[0], none).prefix for n in (1, 2, 3)]
    assert found == [("/bin/taskset", "--cpu-list", processors) for processors in ("0-3", "4-7", "0-3")]
    assert share(2, 2, none, none) == Share()


def test_one_alone_gets_everything(machine: tuple[Path, Path]) -> None:
    assert share(1, 1, *machine) == Share()
