"""What a model takes, against figures that the engine itself gave."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as og
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lingqu.cli.main import app
from pipeline.architecture import architecture
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from services.inference import estimate, memory, sizing, weights
from services.inference.artifact import Architecture, Manifest

GIB = 1 << 30
SMOL = Architecture(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64)


@pytest.mark.parametrize(
    ("precision", "blocks", "allotted"), [("f16", 1456, 1_073_479_680), ("u8", 2452, 1_073_387_520)]
)
def test_the_cache_is_what_the_engine_allots(precision: str, blocks: int, allotted: int) -> None:
    """Read off ContinuousBatchingPipeline.get_metrics() of openvino-genai 2026.4, with a cache of 1 GiB."""
    kv = sizing.KvCache.of(SMOL, precision)
    assert kv.blocks(GIB) == blocks
    assert blocks * kv.block_tokens * kv.bytes_per_token == allotted


def test_it_is_also_what_the_engine_allots_now(artifacts: dict[str, Path]) -> None:
    folder = artifacts[TEXT_MODEL]
    manifest = Manifest.read(folder)
    found = estimate.of(folder, manifest, GIB)
    assert found.kv is not None
    assert manifest.text is not None
    scheduler = og.SchedulerConfig()
    scheduler.cache_size = 1
    path = folder / manifest.text.weights
    pipeline = og.ContinuousBatchingPipeline(
        str(path if path.suffix == ".gguf" else folder), scheduler, "CPU"
    )
    config = og.GenerationConfig()
    config.max_new_tokens = 1
    pipeline.add_request(1, openvino.Tensor(np.ones((1, 8), np.int64)), config)
    pipeline.step()
    allotted = pipeline.get_metrics().kv_cache_size_in_bytes
    assert found.kv.blocks(GIB) * found.kv.block_tokens * found.kv.bytes_per_token == allotted


@given(st.integers(1, 1 << 36), st.integers(1, 1 << 20), st.sampled_from(["f32", "f16", "bf16", "u8"]))
def test_what_is_said_to_fit_fits_and_one_more_does_not(cache: int, tokens: int, precision: str) -> None:
    kv = sizing.KvCache.of(SMOL, precision)
    count = kv.sequences(cache, tokens)
    assert count * kv.bytes_of(tokens) <= cache
    assert (count + 1) * kv.bytes_of(tokens) > cache
    assert (sizing.never_fits(tokens, kv, cache) is None) == (count >= 1)


def test_what_does_not_fit_is_said_with_figures() -> None:
    needed = sizing.footprint("openvino-genai", {"f16": 256 << 20}, kv_cache_bytes=GIB)
    assert sizing.unfit(needed, 64 * GIB) is None
    text = sizing.unfit(needed, GIB) or ""
    assert "it needs 2.0 GiB of memory (weights 794 MiB, KV cache 1.0 GiB, engine 280 MiB)" in text
    assert "1.0 GiB are available here" in text
    kv = sizing.KvCache.of(SMOL, "f16")
    assert "46592" in (sizing.never_fits(50_000, kv, GIB) or "")


@pytest.mark.parametrize(("small_bytes", "graphs"), [(1 << 20, 1), (1 << 40, 3)])
def test_guesses_take_packed_weights_for_each_graph(
    artifacts: dict[str, Path], small_bytes: int, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.backends.guesses.SMALL_BYTES", small_bytes)
    folder = artifacts[TEXT_MODEL]
    manifest = Manifest.read(folder)
    assert manifest.text is not None
    without = estimate.of(folder, manifest, GIB).footprint
    text = manifest.text.model_copy(update={"guesses": 7})
    found = estimate.of(folder, manifest.model_copy(update={"text": text}), GIB).footprint
    more = found.resident - without.resident
    assert more == pytest.approx(graphs * sizing.GUESSING * sum(without.weights.values()), rel=1e-6)
    assert found.kv_cache - without.kv_cache == 4096 * 30 * 3 * 2 * 64 * 2


def test_the_architecture_is_that_of_the_files_description(artifacts: dict[str, Path]) -> None:
    """Also when it is read by our own reader of headers."""
    for file in artifacts[TEXT_MODEL].rglob("*.gguf"):
        found = weights.read(file)
        assert found.architecture == architecture(GGUFReader(str(file))) == SMOL
        assert abs(found.bytes - file.stat().st_size) < 0.03 * file.stat().st_size


def test_an_encoders_weights_are_its_initialisers(artifacts: dict[str, Path]) -> None:
    folder = artifacts[VECTOR_MODEL]
    found = estimate.of(folder, Manifest.read(folder), GIB)
    assert found.footprint.kv_cache == 0
    assert found.footprint.weights["f32"] > 80 << 20
    assert found.footprint.activations > 0


IR = """<net><layers>
<layer id="0" type="Const"><data element_type="u8" shape="4" offset="0" size="4096" /></layer>
<layer id="1" type="Const"><data element_type="f16" shape="4" offset="0" size="8" /></layer>
{states}
</layers><rt_info><runtime_options>{option}</runtime_options></rt_info></net>"""
STATE = '<layer type="ReadValue"><data variable_id="{}" variable_shape="?,{},?,64" /></layer>'


@pytest.mark.parametrize(("option", "precision"), [("", ""), ('<KV_CACHE_PRECISION value="f16" />', "f16")])
def test_openvinos_own_format_is_read(tmp_path: Path, option: str, precision: str) -> None:
    states = "".join(STATE.format(f"{n}.{kind}", 3) for n in range(30) for kind in "kv")
    (tmp_path / "m.xml").write_text(IR.format(states=states, option=option))
    found = weights.read(tmp_path / "m.xml")
    assert found.by_type == {"u8": 4096, "f16": 8}
    assert found.kv_precision == precision
    assert found.architecture is not None
    assert sizing.KvCache.of(found.architecture, "f16") == sizing.KvCache.of(SMOL, "f16")
    mixed = states.replace("?,3,", "?,4,", 1)
    (tmp_path / "m.xml").write_text(IR.format(states=mixed, option=option))
    assert weights.read(tmp_path / "m.xml").architecture is None, "nothing can be multiplied"


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("m.gguf", b""),
        ("m.gguf", b"GGUF"),
        ("m.gguf", b"no!!" + bytes(100)),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(50)),
        ("m.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62)),
        ("m.xml", b"<net>"),
        ("m.xml", b"<net/>"),
        ("m.xml", b'<net><layer type="Const"><data size="x" /></layer></net>'),
    ],
)
def test_damaged_weights_are_called_so(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(weights.UnreadableWeights, match=name):
        weights.read(tmp_path / name)


# --- what there is


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    free = memory.available_bytes(tmp_path)
    assert free > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert memory.available_bytes(tmp_path) == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert memory.available_bytes(tmp_path) == 2_500_000


def test_the_older_kind_of_container_counts_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("5\n")
    assert memory.available_bytes(tmp_path) > 1 << 20
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    assert memory.available_bytes(tmp_path) == 995


# --- the command


def test_the_command_tells_of_an_artifact_without_a_suite(artifacts: dict[str, Path]) -> None:
    arguments = ["models", "size", str(artifacts[TEXT_MODEL]), "--memory", "4GiB", "--sequence", "2048"]
    answer = CliRunner().invoke(app, [*arguments, "-o", "json"])
    assert answer.exit_code == 0, answer.output
    body = json.loads(answer.output)
    assert body["fits"]
    assert body["total"] <= 4 * GIB
    kept = body["kv_bytes_per_token"] * 2048
    assert body["sequences"]["2048"] == body["kv_cache"] // kept
    assert "sequences at once" in CliRunner().invoke(app, arguments).output
    answer = CliRunner().invoke(app, ["models", "size", str(artifacts[VECTOR_MODEL])])
    assert "activations" in answer.output


def test_too_little_memory_is_said(artifacts: dict[str, Path]) -> None:
    answer = CliRunner().invoke(app, ["models", "size", str(artifacts[TEXT_MODEL]), "--memory", "64MiB"])
    assert "too little" in answer.output


def test_what_is_no_size_is_refused(artifacts: dict[str, Path]) -> None:
    answer = CliRunner().invoke(app, ["models", "size", str(artifacts[TEXT_MODEL]), "--memory", "24 apples"])
    assert answer.exit_code == 1


def test_the_estimates_are_near_what_was_measured(artifacts: dict[str, Path]) -> None:
    """Resident memory of the processes in Triton 2.51, warmed up, the KV cache touched to its end (MiB): 2277
    for SmolLM2-135M from GGUF in f16 with a cache of 1 GiB, 460 for MiniLM-L6 after runs of 16 x 256."""
    gguf = sizing.footprint("openvino-genai", {"f16": 268_959_744}, gguf=True, kv_cache_bytes=GIB)
    assert gguf.total / (1 << 20) == pytest.approx(2277, rel=0.05)
    folder = artifacts[VECTOR_MODEL]
    found = estimate.of(folder, Manifest.read(folder), 0).footprint
    assert found.total / (1 << 20) == pytest.approx(460, rel=0.1)
