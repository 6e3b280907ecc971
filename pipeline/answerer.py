"""Extractive question answering checkpoints of transformers become ONNX artifacts."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering
from transformers.utils import logging as transformers_logging

from pipeline.graphs import computed, difference, export, max_tokens, parent, signature, tokenizer_of
from pipeline.package import About, Package, digests, seal, staging_folder
from services.inference.artifact import AnswererSpec, GoldenAnswer, Manifest, Requirements
from services.inference.extraction import Window, best
from services.inference.requirements import same_minor

OUTPUTS = ("start_logits", "end_logits")
GOLDEN_QUESTIONS = (
    ("Where does Ada live?", "Ada lives in Turin and works as a baker."),
    (
        "Which rivers does the canal join?",
        "The Lingqu canal was dug in 214 BC. It joins the Xiang, which flows north, with the Li, which flows "
        "south, and ships have passed from one to the other ever since.",
    ),
    ("灵渠沟通了什么?", "灵渠沟通了湘江和漓江。"),
    ("Who wrote the book?", "The train leaves at nine from platform four."),
)
MAX_ANSWER_TOKENS = 32
# Golden answers are equal wherever they are computed only if the best is ahead of the next by more than
# rounding.
MARGIN = 1e-2


class Answerer(torch.nn.Module):  # type: ignore[misc]  # torch is not followed: it takes minutes
    """INT64 [batch, tokens] of each of `inputs` → start and end logits, FP32 [batch, tokens]."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return output.start_logits, output.end_logits


def package_answerer(
    checkpoint: Path,
    store: Path,
    about: About = About(),  # noqa: B008 - immutable
    no_answer: bool = False,
) -> Package:
    """Export, compare with torch, seal. `no_answer`: the model was trained to choose its first token where
    there is no answer (SQuAD 2.0). Raises ParityError, ValueError."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForQuestionAnswering.from_pretrained(
        checkpoint, attn_implementation="eager", local_files_only=True
    ).eval()
    tokenizer = tokenizer_of(checkpoint)
    staging = staging_folder(store)
    tokenizer.save(str(staging / "tokenizer.json"))
    shutil.copy(checkpoint / "config.json", staging / "config.json")
    spec = AnswererSpec(
        weights="model.onnx",
        max_tokens=max_tokens(checkpoint, model),
        vocabulary=model.config.vocab_size,
        token_types="token_type_ids" in inspect.signature(model.forward).parameters
        and getattr(model.config, "type_vocab_size", 0) > 1,
        no_answer=no_answer,
    )
    answerer = Answerer(model, spec.inputs).eval()
    export(answerer, staging / "model.onnx", spec.inputs, dict.fromkeys(OUTPUTS, True))

    tokenizer.enable_truncation(spec.max_tokens, strategy="only_second")
    pairs = list(GOLDEN_QUESTIONS)
    alone = tokenizer.encode_batch(pairs)
    tokenizer.enable_padding()
    worst = 0.0
    golden = []
    for encodings in (tokenizer.encode_batch(pairs), *([one] for one in alone)):
        tensors = _tensors(encodings, spec.inputs)
        with torch.inference_mode():
            expected = [logits.numpy() for logits in answerer(*map(torch.from_numpy, tensors.values()))]
        found = computed(staging / "model.onnx", tensors, OUTPUTS)
        real = tensors["attention_mask"] == 1
        for one, other in zip(found, expected, strict=True):
            worst = max(worst, difference(one[real], other[real]))
        golden.append(expected)
    examples = [
        _golden(*pair, encoding, starts[0], ends[0], no_answer)
        for pair, encoding, (starts, ends) in zip(pairs, alone, golden[1:], strict=True)
    ]
    manifest = Manifest(
        task="answer",
        runtime="onnxruntime",
        files=digests(staging),
        answerer=spec,
        golden_answers=tuple(example for example in examples if example is not None),
        requirements=Requirements(engine=same_minor("onnxruntime")),
        signature=signature(staging / "model.onnx"),
        **about.found({"parity_difference": float(f"{worst:.2e}")}, parent(checkpoint)).parts,
    )
    return seal(staging, manifest, store)


def _tensors(encodings: list[Any], inputs: tuple[str, ...]) -> dict[str, Any]:
    parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(e, parts[name]) for e in encodings], np.int64) for name in inputs}


def _golden(
    question: str, context: str, encoding: Any, starts: Any, ends: Any, no_answer: bool
) -> GoldenAnswer | None:
    """None where another span, or no answer, is as good but for rounding."""
    at = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    context_tokens = slice(at[0], at[-1] + 1)
    places = np.array(encoding.offsets[context_tokens], np.int64)
    null = float(starts[0]), float(ends[0])
    window = Window(0, places, starts[context_tokens], ends[context_tokens], null)
    sums = np.triu(window.starts[:, None] + window.ends[None, :])
    sums = np.where(np.triu(np.tri(len(at), k=MAX_ANSWER_TOKENS - 1)), sums, -np.inf)
    ranked = np.sort(np.append(sums.reshape(-1), [sum(null)] if no_answer else []))
    if len(ranked) > 1 and ranked[-1] - ranked[-2] < MARGIN:
        return None
    spans = best([window], 1, MAX_ANSWER_TOKENS, no_answer)
    if not spans:
        return GoldenAnswer(question=question, context=context, start=0, end=0, score=0.0)
    (span,) = spans
    return GoldenAnswer(question=question, context=context, start=span.start, end=span.end, score=span.score)
