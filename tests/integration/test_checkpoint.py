"""A Hugging Face checkpoint as an artifact for TensorRT-LLM: what is in it, and what opens it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.bundled import TEXT_MODEL
from pipeline.checkpoint import INDEX, ONE, package_checkpoint
from pipeline.package import Package
from services.inference import estimate, weights
from services.inference.artifact import Manifest
from services.inference.backends.texts import open_text
from tests.unit.test_tensorrt_llm import FakeModule

LAYERS, HIDDEN, HEADS, KV_HEADS = 2, 32, 4, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, artifacts: dict[str, Path]) -> Path:
    """A tiny model of random weights that is sure of what it says."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(artifacts[TEXT_MODEL] / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=[2, 0],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 400
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_checkpoint(checkpoint, tmp_path_factory.mktemp("store"))


def test_it_describes_the_model_and_keeps_the_references_answers(package: Package) -> None:
    manifest = package.manifest
    assert manifest.text is not None
    assert (manifest.runtime, manifest.task, manifest.text.weights) == ("tensorrt-llm", "generate", ONE)
    assert manifest.text.eos_token_ids == (0, 2)
    assert manifest.text.context_tokens == 128
    model = AutoModelForCausalLM.from_pretrained(package.folder, dtype=torch.float32).eval()
    for example in manifest.golden_texts:
        ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
        with torch.inference_mode():
            said = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].argmax(dim=-1)
        assert tuple(said.tolist()) == example.token_ids


def test_its_size_is_read_from_the_headers(package: Package) -> None:
    found = estimate.of(package.folder, package.manifest, 1 << 30)
    assert found.architecture is not None
    assert (found.architecture.layers, found.architecture.kv_heads) == (LAYERS, KV_HEADS)
    assert found.kv is not None
    assert found.kv.bytes_per_token == LAYERS * KV_HEADS * 2 * (HIDDEN // HEADS) * 2
    stored = torch.tensor(
        [p.numel() for p in AutoModelForCausalLM.from_pretrained(package.folder).parameters()]
    )
    assert weights.read(package.folder / ONE).by_type == {"f32": 4 * int(stored.sum())}


def test_the_index_of_several_files_is_read(package: Package, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).symlink_to(package.folder / ONE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    one = weights.read(package.folder / ONE).bytes
    assert weights.read(tmp_path / INDEX).bytes == 2 * one


@pytest.mark.parametrize(
    "raw", [b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"[1,2]", b"\x02" + b"\0" * 7 + b"7 "]
)
def test_a_damaged_header_is_called_so(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ONE).write_bytes(raw)
    with pytest.raises(weights.UnreadableWeights):
        weights.read(tmp_path / ONE)


def test_the_engine_is_given_the_checkpoint_and_its_share_of_memory(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = FakeModule([])
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    runtime: Any = open_text(package.manifest, package.folder, 1, 8)
    runtime.close()
    assert module.opened["model"] == str(package.folder)
    assert module.opened["kv_cache_config"]["max_tokens"] == (1 << 30) // (LAYERS * KV_HEADS * 2 * 8 * 2)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ImportError):
        open_text(package.manifest, package.folder, 1, 8)
    encoder: Any = Manifest.model_construct(
        task="generate", runtime="onnxruntime", text=package.manifest.text
    )
    with pytest.raises(ValueError, match="computes no texts"):
        open_text(encoder, package.folder, 1, 8)


def test_what_is_no_checkpoint_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config"):
        package_checkpoint(tmp_path, tmp_path / "store")
