"""Text models for TensorRT-LLM: a Hugging Face checkpoint becomes an artifact with golden answers.

The engine reads the checkpoint itself, in fp16, on the GPU that serves it, so nothing is converted here. The
golden answers are those of the reference implementation (transformers, FP32), as far as it is sure of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.decoder import GOLDEN_PROMPTS, GOLDEN_TOKENS, certain
from pipeline.package import About, Package, digests, seal, staging_folder
from services.inference.artifact import Architecture, GoldenText, Manifest, TextSpec

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
MIN_AGREEMENT = 0.98  # of the reference with itself: token by token, and all at once
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def package_checkpoint(checkpoint: Path, store: Path, about: About = About()) -> Package:  # noqa: B008
    """Raises FileNotFoundError if it is no checkpoint in safetensors, ValueError if its configuration does
    not say what is needed, and ParityError if the reference is sure of too few tokens."""
    weights = next((name for name in (INDEX, ONE) if (checkpoint / name).is_file()), None)
    if weights is None or not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} has no config.json with {ONE} or {INDEX}")
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    ).eval()
    golden, _ = certain(model, checkpoint.name, _golden(model, tokenizer), MIN_AGREEMENT)
    staging = staging_folder(store)
    for name in [*COPIED, weights, *_shards(checkpoint, weights)]:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, staging / name)
    tokenizer.backend_tokenizer.save(str(staging / "tokenizer.json"))
    if tokenizer.chat_template:
        (staging / "chat_template.jinja").write_text(tokenizer.chat_template)
    spec = TextSpec(
        weights=weights,
        context_tokens=_number(config, "max_position_embeddings"),
        vocabulary=len(tokenizer),
        eos_token_ids=_eos(config, tokenizer),
        architecture=_architecture(config),
    )
    manifest = Manifest(
        task="generate",
        runtime="tensorrt-llm",
        files=digests(staging),
        text=spec,
        golden_texts=golden,
        **about.found({}, str(config.get("_name_or_path", ""))[:256]).parts,
    )
    return seal(staging, manifest, store)


def _golden(model: Any, tokenizer: Any) -> tuple[GoldenText, ...]:
    """Greedy answers of the reference."""
    found = []
    for prompt in GOLDEN_PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(**ids, max_new_tokens=GOLDEN_TOKENS, do_sample=False)
        given = ids["input_ids"][0].tolist()
        found.append(
            GoldenText(prompt=prompt, prompt_ids=given, token_ids=tuple(made[0, len(given) :].tolist()))
        )
    return tuple(found)


def _shards(checkpoint: Path, weights: str) -> list[str]:
    if weights == ONE:
        return []
    named = json.loads((checkpoint / weights).read_text())["weight_map"].values()
    return sorted({Path(name).name for name in named})


def _architecture(config: dict[str, Any]) -> Architecture:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    return Architecture(
        layers=_number(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
    )


def _eos(config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    said = config.get("eos_token_id", tokenizer.eos_token_id)
    found = said if isinstance(said, list) else [said]
    return tuple(sorted({int(number) for number in found if number is not None}))


def _number(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise ValueError(f"config.json does not say {name}")
    return value
