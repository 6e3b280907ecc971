"""Sentence encoders for TensorRT: the same graph in half precision.

TensorRT computes in the types of the graph, so fp16 is decided here: the transformer's weights and products
are fp16, pooling and normalisation, where sums grow long, are fp32. Inputs and outputs are those of the fp32
graph. Parity with torch in fp32 is proven with ONNX Runtime on CPU; on a GPU the golden vectors prove it
again.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from pipeline.encoder import GOLDEN_TEXTS, SentenceEncoder, check_parity
from pipeline.graphs import export, signature
from pipeline.package import About, Package, digests, seal, staging_folder
from services.inference.artifact import GoldenVector, Manifest, VectorSpec

WEIGHTS = "model.fp16.onnx"


class HalfStates(torch.nn.Module):  # type: ignore[misc]  # torch is not followed: it takes minutes
    """A transformer in fp16 whose states come out in fp32."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = copy.deepcopy(transformer).half()

    def forward(self, **inputs: torch.Tensor) -> Any:
        found = self.transformer(**inputs)
        found.last_hidden_state = found.last_hidden_state.float()
        return found


def package_half(checkpoint: Path, store: Path, about: About = About()) -> Package:  # noqa: B008 - immutable
    """Export in fp16, compare with torch in fp32, seal. Raises ParityError, ValueError."""
    pooling = json.loads((checkpoint / "1_Pooling" / "config.json").read_text())
    if not pooling.get("pooling_mode_mean_tokens"):
        raise ValueError(f"{checkpoint}: only mean pooling is supported")
    max_tokens = int(json.loads((checkpoint / "sentence_bert_config.json").read_text())["max_seq_length"])
    transformers_logging.disable_progress_bar()
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager", local_files_only=True).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    staging = staging_folder(store)
    half = SentenceEncoder(HalfStates(model)).eval()
    export(half, staging / WEIGHTS, ("input_ids", "attention_mask"), {"embedding": False})
    whole, golden, cosines = SentenceEncoder(model).eval(), [], []
    for text in GOLDEN_TEXTS:  # each alone: of its own length
        ids = torch.tensor([tokenizer.encode(text).ids])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            expected = whole(ids, mask).numpy()
        cosines.append(check_parity(staging / WEIGHTS, ids.numpy(), mask.numpy(), expected))
        golden.append(GoldenVector(text=text, vector=tuple(float(x) for x in expected[0])))
    tokenizer.no_truncation()
    tokenizer.save(str(staging / "tokenizer.json"))
    shutil.copy(checkpoint / "config.json", staging / "config.json")
    manifest = Manifest(
        task="embed",
        runtime="tensorrt",
        files=digests(staging),
        vector=VectorSpec(
            weights=WEIGHTS,
            max_tokens=max_tokens,
            vocabulary=model.config.vocab_size,
            dimensions=expected.shape[1],
        ),
        golden_vectors=tuple(golden),
        signature=signature(staging / WEIGHTS),
        **about.found({"parity_cosine": round(min(cosines), 6)}, "").parts,
    )
    return seal(staging, manifest, store)
