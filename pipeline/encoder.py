"""Sentence encoders: a BERT-like checkpoint in the sentence-transformers layout becomes an ONNX artifact.

The graph does all that the model's card does behind the tokeniser: the transformer, mean pooling over the
tokens that are no padding, and L2 normalisation (https://www.sbert.net/docs/package_reference).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from pipeline.graphs import export, parent, signature
from pipeline.package import About, Package, ParityError, digests, seal, staging_folder
from services.inference.artifact import GoldenVector, Manifest, Requirements, VectorSpec
from services.inference.requirements import same_minor

# The exported graph must agree with torch to this cosine on every golden text.
MIN_COSINE = 0.9999
GOLDEN_TEXTS = (
    "The canal joined two rivers.",
    "A model is released when it has proven itself.",
    "灵渠沟通了湘江和漓江。",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and "
    "arrows of outrageous fortune, or to take arms against a sea of troubles, and by opposing end them.",
)


class SentenceEncoder(torch.nn.Module):  # type: ignore[misc]  # torch is not followed: it takes minutes
    """input_ids and attention_mask, INT64 [batch, tokens] → unit vectors, FP32 [batch, dimensions]."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def package_encoder(checkpoint: Path, store: Path, about: About = About()) -> Package:  # noqa: B008 - immutable
    """Export, compare with torch, seal. Raises ParityError."""
    pooling = json.loads((checkpoint / "1_Pooling" / "config.json").read_text())
    if not pooling.get("pooling_mode_mean_tokens"):
        raise ValueError(f"{checkpoint}: only mean pooling is supported")
    max_tokens = int(json.loads((checkpoint / "sentence_bert_config.json").read_text())["max_seq_length"])
    transformers_logging.disable_progress_bar()
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager", local_files_only=True)
    encoder = SentenceEncoder(model.eval()).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(list(GOLDEN_TEXTS))
    ids = np.array([e.ids for e in batch], np.int64)
    mask = np.array([e.attention_mask for e in batch], np.int64)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    staging = staging_folder(store)
    export(encoder, staging / "model.onnx", ("input_ids", "attention_mask"), {"embedding": False})
    cosines = [check_parity(staging / "model.onnx", ids, mask, expected)]
    for row, real in enumerate(mask.sum(axis=1)):  # traced with one shape: prove others as well
        alone = (ids[row : row + 1, :real], mask[row : row + 1, :real])
        cosines.append(check_parity(staging / "model.onnx", *alone, expected[row : row + 1]))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(staging / "tokenizer.json"))
    shutil.copy(checkpoint / "config.json", staging / "config.json")
    manifest = Manifest(
        task="embed",
        runtime="onnxruntime",
        files=digests(staging),
        vector=VectorSpec(
            weights="model.onnx",
            max_tokens=max_tokens,
            vocabulary=model.config.vocab_size,
            dimensions=expected.shape[1],
        ),
        golden_vectors=tuple(
            GoldenVector(text=text, vector=tuple(float(x) for x in row))
            for text, row in zip(GOLDEN_TEXTS, expected, strict=True)
        ),
        requirements=Requirements(engine=same_minor("onnxruntime")),
        signature=signature(staging / "model.onnx"),
        **about.found({"parity_cosine": round(min(cosines), 6)}, parent(checkpoint)).parts,
    )
    return seal(staging, manifest, store)


def check_parity(path: Path, ids: Any, mask: Any, expected: Any) -> float:
    """The lowest cosine of ONNX Runtime's rows and torch's. Raises ParityError if it is below MIN_COSINE."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
    worst = float(np.min(np.sum(found * expected, axis=1)))
    if not worst >= MIN_COSINE:
        raise ParityError(f"{path.name}: cosine with torch is {worst:.6f}, below {MIN_COSINE}")
    return worst
