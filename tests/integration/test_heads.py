"""Classifiers and answerers from small checkpoints of several families: what the pipeline makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline import graphs
from pipeline.answerer import package_answerer
from pipeline.classifier import package_classifier
from pipeline.package import ParityError
from services.inference.artifact import Manifest
from tests.checkpoints import shipped

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30522,
}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    shutil.copy(shipped() / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize(
    ("options", "multi_label", "sums_to_one"),
    [
        ({"num_labels": 3}, False, True),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, True, False),
        ({"num_labels": 1}, True, False),
    ],
)
def test_what_labels_share(
    tmp_path: Path, options: dict[str, Any], multi_label: bool, sums_to_one: bool
) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=64, **options))
    package = package_classifier(saved(model, tmp_path / "c"), tmp_path / "store")
    manifest = Manifest.read(package.folder)
    assert manifest.classifier is not None
    assert manifest.classifier.multi_label == multi_label
    assert manifest.classifier.labels == tuple(f"LABEL_{n}" for n in range(options["num_labels"]))
    assert manifest.classifier.max_tokens == 64
    for golden in manifest.golden_labels:
        assert (abs(sum(golden.scores) - 1) < 1e-5) == sums_to_one
    assert manifest.golden_examples == len(manifest.golden_labels)
    assert [t.name for t in manifest.signature.outputs] == ["logits"]


def test_positions_that_begin_behind_the_padding_are_not_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1)
    package = package_classifier(
        saved(RobertaForSequenceClassification(config), tmp_path / "c"), tmp_path / "store"
    )
    spec = package.manifest.classifier
    assert spec is not None
    assert spec.max_tokens == 64
    # A text as long as that is computed, and padding of any kind changes nothing.
    ids = np.full((1, 64), 1000)
    graph = package.folder / "model.onnx"
    (alone,) = graphs.computed(graph, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, ["logits"])
    short = {"input_ids": ids[:, :9], "attention_mask": np.ones((1, 9), np.int64)}
    (expected,) = graphs.computed(graph, short, ["logits"])
    ids[:, 9:] = 0
    mask = (np.arange(64) < 9).astype(np.int64)[None]
    (padded,) = graphs.computed(graph, {"input_ids": ids, "attention_mask": mask}, ["logits"])
    assert alone.shape == (1, 2)
    assert np.allclose(padded, expected, atol=1e-5)


def test_a_regression_is_no_classifier(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=1, problem_type="regression"))
    with pytest.raises(ValueError, match="regression"):
        package_classifier(saved(model, tmp_path / "c"), tmp_path / "store")


@pytest.mark.parametrize("no_answer", [False, True])
def test_graphs_take_token_types_where_the_model_does(tmp_path: Path, no_answer: bool) -> None:
    torch.manual_seed(0)
    bert = BertForQuestionAnswering(BertConfig(**SMALL, max_position_embeddings=64))
    other = DistilBertForQuestionAnswering(
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64)
    )
    for name, model, inputs in (
        ("bert", bert, ["input_ids", "attention_mask", "token_type_ids"]),
        ("distilbert", other, ["input_ids", "attention_mask"]),
    ):
        package = package_answerer(saved(model, tmp_path / name), tmp_path / "store", no_answer=no_answer)
        spec = package.manifest.answerer
        assert spec is not None
        assert list(spec.inputs) == [t.name for t in package.manifest.signature.inputs] == inputs
        assert spec.no_answer == no_answer
        for golden in package.manifest.golden_answers:
            assert golden.context[golden.start : golden.end] or no_answer


@pytest.mark.parametrize("off", [1e-2, float("nan")])
def test_logits_that_are_not_torchs_are_found_out(off: float) -> None:
    expected = np.array([[0.5, -3.0]], np.float32)
    assert graphs.difference(expected + 1e-6, expected) < 1e-5
    with pytest.raises(ParityError, match="differ"):
        graphs.difference(expected + off, expected)
