"""Sequence classification checkpoints of transformers become ONNX artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from pipeline.graphs import computed, difference, export, max_tokens, parent, signature, tokenizer_of
from pipeline.package import About, Package, digests, seal, staging_folder
from services.inference.artifact import ClassifierSpec, GoldenLabels, Manifest, Requirements
from services.inference.classifier import probabilities
from services.inference.requirements import same_minor

GOLDEN_TEXTS = (
    "What a wonderful day, everything went well!",
    "This is the worst service I have ever had.",
    "The train leaves at nine from platform four.",
    "灵渠沟通了湘江和漓江。",
    "You have won a prize: send your account number now to receive it, this offer ends today.",
)
# Golden labels are equal wherever they are computed only if the best is ahead of the next by more than
# rounding.
MARGIN = 5e-3


class Classifier(torch.nn.Module):  # type: ignore[misc]  # torch is not followed: it takes minutes
    """input_ids and attention_mask, INT64 [batch, tokens] → logits, FP32 [batch, labels]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def package_classifier(checkpoint: Path, store: Path, about: About = About()) -> Package:  # noqa: B008 - immutable
    """Export, compare with torch, seal. Raises ParityError, ValueError."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, attn_implementation="eager", local_files_only=True
    ).eval()
    if model.config.problem_type == "regression":
        raise ValueError(f"{checkpoint}: a regression has no labels")
    # With a single label there is nothing to share a probability with.
    multi_label = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
    labels = tuple(str(model.config.id2label[index]) for index in range(model.config.num_labels))
    limit = max_tokens(checkpoint, model)
    tokenizer = tokenizer_of(checkpoint)
    staging = staging_folder(store)
    tokenizer.save(str(staging / "tokenizer.json"))
    shutil.copy(checkpoint / "config.json", staging / "config.json")
    classifier = Classifier(model).eval()
    export(classifier, staging / "model.onnx", ("input_ids", "attention_mask"), {"logits": False})

    tokenizer.enable_truncation(limit)
    alone = [_tensors([encoding]) for encoding in tokenizer.encode_batch(list(GOLDEN_TEXTS))]
    tokenizer.enable_padding()
    together = _tensors(tokenizer.encode_batch(list(GOLDEN_TEXTS)))
    logits = []
    worst = 0.0
    for tensors in (together, *alone):  # traced with one shape: others prove that it does not matter
        with torch.inference_mode():
            expected = classifier(*map(torch.from_numpy, tensors.values())).numpy()
        (found,) = computed(staging / "model.onnx", tensors, ["logits"])
        worst = max(worst, difference(found, expected))
        logits.append(expected)
    scores = probabilities(np.concatenate(logits[1:]), multi_label)
    manifest = Manifest(
        task="classify",
        runtime="onnxruntime",
        files=digests(staging),
        classifier=ClassifierSpec(
            weights="model.onnx",
            max_tokens=limit,
            vocabulary=model.config.vocab_size,
            labels=labels,
            multi_label=multi_label,
        ),
        golden_labels=tuple(
            GoldenLabels(text=text, scores=tuple(row))
            for text, row in zip(GOLDEN_TEXTS, scores.tolist(), strict=True)
            if _clear(row)
        ),
        requirements=Requirements(engine=same_minor("onnxruntime")),
        signature=signature(staging / "model.onnx"),
        **about.found({"parity_difference": float(f"{worst:.2e}")}, parent(checkpoint)).parts,
    )
    return seal(staging, manifest, store)


def _tensors(encodings: list[Any]) -> dict[str, Any]:
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
    }


def _clear(scores: list[float]) -> bool:
    best, *others = sorted(scores, reverse=True)
    return not others or best - others[0] >= MARGIN
