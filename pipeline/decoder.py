"""Text models: a GGUF file becomes an artifact with its tokenizer, chat template and golden answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.architecture import architecture
from pipeline.openvino_model import (
    GRAMMAR,
    MODEL,
    field,
    write_grammar_model,
    write_model,
    write_tokenizer,
)
from pipeline.package import About, Package, ParityError, Precision, digests, seal, staging_folder
from services.inference.artifact import GoldenText, Manifest, Requirements, TextSpec
from services.inference.backends.guessing import open_guessing
from services.inference.backends.jobs import Job, Runtime, Sampling
from services.inference.backends.openvino_text import OpenVinoText
from services.inference.requirements import same_minor

GOLDEN_TOKENS = 16
GUESSES = 7  # a step, of a stream alone; more cost what they gain (docs/benchmarks.md)
# Not 1: on processors that compute in another precision a near tie may fall the other way.
MIN_AGREEMENT: dict[Precision, float] = {"fp16": 0.85, "int8": 0.85, "int4": 0.6}
MIN_MARGIN = 0.75  # logits between the likeliest token and the next
MIN_CERTAIN_TOKENS = 16
GOLDEN_PROMPTS = (
    "The canal joined two rivers and",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "a b c d e f g h i j",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)


def package_gguf(
    gguf: Path,
    store: Path,
    about: About = About(),  # noqa: B008 - immutable
    precision: Precision = "fp16",
) -> Package:
    """Read the model's own description, convert weights and tokenizer, compute the golden answers, seal."""
    reader = GGUFReader(str(gguf))
    context = int(field(reader, f"{field(reader, 'general.architecture')}.context_length"))
    eos = {int(field(reader, "tokenizer.ggml.eos_token_id"))}
    staging = staging_folder(store)
    write_model(reader, staging, precision)
    write_grammar_model(reader, staging / GRAMMAR)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    tokenizer.backend_tokenizer.save(str(staging / "tokenizer.json"))
    if tokenizer.chat_template:
        (staging / "chat_template.jinja").write_text(tokenizer.chat_template)
    write_tokenizer(tokenizer, sorted(eos), staging)
    spec = TextSpec(
        weights=MODEL,
        context_tokens=context,
        vocabulary=len(tokenizer),
        eos_token_ids=tuple(sorted(eos)),
        precision=precision,
        guesses=GUESSES if precision == "int4" else 0,
        grammar=f"{GRAMMAR}/{MODEL}",
        architecture=architecture(reader),
    )
    examples = _golden(staging, spec, tokenizer)
    golden, agreement = certain(reference(gguf), gguf.name, examples, MIN_AGREEMENT[precision])
    name = reader.get_field("general.name")
    parent = str(name.contents())[:256] if name is not None else ""
    manifest = Manifest(
        task="generate",
        runtime="openvino-genai",
        files=digests(staging),
        text=spec,
        golden_texts=golden,
        requirements=Requirements(engine=same_minor("openvino-genai")),
        **about.found({"reference_agreement": round(agreement, 6)}, parent).parts,
    )
    return seal(staging, manifest, store)


def reference(gguf: Path) -> Any:
    """What transformers reads out of the file, in FP32."""
    transformers_logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):  # the GGUF reader has a progress bar of its own
        return AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        ).eval()


def certain(
    model: Any, name: str, golden: Sequence[GoldenText], min_agreement: float
) -> tuple[tuple[GoldenText, ...], float]:
    """The examples up to where the reference implementation (`model` of transformers, FP32) is sure of the
    token, too; and the share of all their tokens that it takes for the likeliest.

    What a batch or a cached prefix changes in the last bits may decide a near tie, and must not decide
    whether a version is refused. Raises ParityError if the reference takes other tokens for the likeliest too
    often, or is sure of too few."""
    agreed = total = 0
    kept: list[GoldenText] = []
    for example in golden:
        ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
        with torch.inference_mode():
            best = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].topk(2, dim=-1)
        same = best.indices[:, 0] == torch.tensor(example.token_ids)
        agreed, total = agreed + int(same.sum()), total + len(same)
        sure = (same & (best.values[:, 0] - best.values[:, 1] >= MIN_MARGIN)).tolist()
        length = sure.index(False) if False in sure else len(sure)
        if length:
            kept.append(example.model_copy(update={"token_ids": example.token_ids[:length]}))
    if agreed < min_agreement * total:
        raise ParityError(f"{name}: the reference agrees with {agreed} of {total} golden tokens only")
    if sum(len(example.token_ids) for example in kept) < MIN_CERTAIN_TOKENS:
        raise ParityError(f"{name}: the reference is sure of too few golden tokens")
    return tuple(kept), agreed / total


def _golden(folder: Path, spec: TextSpec, tokenizer: Any) -> tuple[GoldenText, ...]:
    """Greedy answers of the engine that will serve the model, computed one at a time; where it guesses for a
    stream that is alone, up to where both ways agree."""
    runtimes: list[Runtime] = [OpenVinoText(folder, spec, kv_cache_gib=1, max_sequences=1)]
    if spec.guesses:
        runtimes.append(open_guessing(folder, spec))
    found = []
    for number, prompt in enumerate(GOLDEN_PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answers = [_answer(runtime, number, ids) for runtime in runtimes]
        tokens = tuple(
            same[0] for same in takewhile(lambda all_: len(set(all_)) == 1, zip(*answers, strict=False))
        )
        found.append(GoldenText(prompt=prompt, prompt_ids=tuple(ids), token_ids=tokens))
    return tuple(found)


def _answer(runtime: Runtime, number: int, ids: Sequence[int]) -> list[int]:
    handle = runtime.add(number, Job(0, ids, Sampling(GOLDEN_TOKENS)))
    tokens: list[int] = []
    while not handle.is_over():
        runtime.step()
        tokens += handle.take().tokens
    return tokens
