"""Which engine computes a text model: the one that its artifact was made for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from services.inference.artifact import Manifest, TextSpec
from services.inference.backends.alone import Alone
from services.inference.backends.jobs import Runtime
from services.inference.sizing import KvCache

GIB = 1 << 30


def open_text(
    manifest: Manifest,
    folder: Path,
    kv_cache_gib: int,
    max_sequences: int,
    log: Callable[[str], None] = lambda text: None,
) -> Runtime:
    """Load the text model of an artifact. Raises ImportError where its engine is not installed, ValueError
    for one that computes no texts, and what the engine raises for files that it cannot read."""
    spec = manifest.text
    if spec is None:
        raise ValueError("the artifact's manifest describes no text model")
    if manifest.runtime == "openvino-genai":
        from services.inference.backends.guessing import open_guessing
        from services.inference.backends.openvino_text import OpenVinoText

        shared = OpenVinoText(folder, spec, kv_cache_gib, max_sequences, log)
        return Alone(shared, open_guessing(folder, spec)) if spec.guesses else shared
    if manifest.runtime == "tensorrt-llm":
        from services.inference.backends.tensorrt_llm import open_pipeline

        module = importlib.import_module("tensorrt_llm")
        checkpoint = (folder / spec.weights).parent
        tokens = _cache_tokens(spec, kv_cache_gib)
        return open_pipeline(
            module, checkpoint, spec.eos_token_ids, spec.context_tokens, max_sequences, tokens
        )
    raise ValueError(f'"{manifest.runtime}" computes no texts')


def _cache_tokens(spec: TextSpec, kv_cache_gib: int) -> int | None:
    """How many tokens so much memory holds in half precision, not less than one sequence needs; None where
    the artifact does not tell: then the engine takes what is free."""
    if spec.architecture is None:
        return None
    per_token = KvCache.of(spec.architecture, "f16").bytes_per_token
    return max(kv_cache_gib * GIB // per_token, spec.context_tokens)
