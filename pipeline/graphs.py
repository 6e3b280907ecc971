"""Checkpoints of transformers as ONNX graphs: what the encoders of every task have in common."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipeline.package import ParityError
from services.inference.artifact import Signature, TensorSignature

OPSET = 18
DATATYPES = {"tensor(int64)": "INT64", "tensor(float)": "FP32", "tensor(float16)": "FP16"}
# Tokens of a model that does not say how many it reads.
MAX_TOKENS = 512
# Logits of the exported graph and of torch may differ by this much, relative to the largest of them.
MAX_DIFFERENCE = 1e-4


def export(module: torch.nn.Module, path: Path, inputs: Sequence[str], outputs: Mapping[str, bool]) -> None:
    """Write `module` as ONNX with free batch and token axes; `outputs` by name, and whether they have a
    component for each token."""
    example = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    with warnings.catch_warnings():
        # The tracer warns of shapes it takes for constants; parity with other shapes proves that none
        # matters.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,) * len(inputs),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={
                **dict.fromkeys(inputs, axes),
                **{name: axes if tokens else {0: "batch"} for name, tokens in outputs.items()},
            },
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path))


def computed(path: Path, tensors: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
    """What ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(list(outputs), dict(tensors)))


def difference(found: Any, expected: Any) -> float:
    """The largest difference of logits, relative to the largest of them. Raises ParityError above
    MAX_DIFFERENCE, or where something is no number."""
    worst = float(np.max(np.abs(found - expected)) / max(1.0, float(np.max(np.abs(expected)))))
    if not worst <= MAX_DIFFERENCE:
        raise ParityError(f"logits differ from torch's by {worst:.2e}, more than {MAX_DIFFERENCE:.0e}")
    return worst


def signature(path: Path) -> Signature:
    """The inputs and outputs of a graph; an axis with a name varies."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs, outputs = (
        tuple(
            TensorSignature(
                name=one.name,
                datatype=DATATYPES[one.type],
                shape=tuple(axis if isinstance(axis, int) else -1 for axis in one.shape),
            )
            for one in group
        )
        for group in (session.get_inputs(), session.get_outputs())
    )
    return Signature(inputs=inputs, outputs=outputs)


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    """A checkpoint's tokenizer, neither padding nor cutting. Raises ValueError if it has none that the
    `tokenizers` package can run."""
    if (checkpoint / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    else:
        made = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        if not hasattr(made, "backend_tokenizer"):
            raise ValueError(f"{checkpoint}: has no tokenizer.json, and none can be made of what it has")
        tokenizer = made.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def max_tokens(checkpoint: Path, model: Any) -> int:
    """How many tokens the model reads: what its tokenizer says, but never more than it has positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    embedding = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    # RoBERTa's positions begin behind the one for padding.
    padding = getattr(embedding, "padding_idx", None)
    positions -= 0 if padding is None else padding + 1
    config = checkpoint / "tokenizer_config.json"
    told = json.loads(config.read_text()).get("model_max_length") if config.is_file() else None
    return min(int(told), positions) if told else int(positions)


def parent(checkpoint: Path) -> str:
    """The base model, in the checkpoint's own words."""
    return str(json.loads((checkpoint / "config.json").read_text()).get("_name_or_path", ""))[:256]
