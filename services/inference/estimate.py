"""What a version takes, from its artifact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.inference import sizing, weights
from services.inference.artifact import Architecture, Manifest
from services.inference.backends import guesses
from services.inference.backends.alone import MOST_TOKENS

DEFAULT_KV_PRECISION = "u8"  # OpenVINO's CPU plugin, where a model's file says nothing else
RUN_TOKENS = 4096  # of one run of an encoder: backends/runs.py


@dataclass(frozen=True, slots=True)
class Estimate:
    """`kv` and `architecture` are those of a text model, None where the artifact does not tell them."""

    footprint: sizing.Footprint
    architecture: Architecture | None = None
    kv: sizing.KvCache | None = None


def of(folder: Path, manifest: Manifest, kv_cache_bytes: int) -> Estimate:
    """Raises UnreadableWeights, OSError."""
    spec = manifest.text or manifest.encoder
    if spec is None or spec.weights not in manifest.files:
        # Any model for the Python backend: its files are all that is known of it.
        size = sum(file.size for name, file in manifest.files.items() if not name.endswith((".py", ".pbtxt")))
        return Estimate(sizing.footprint(manifest.runtime, {"files": size}))
    found = weights.read(folder / spec.weights)
    if manifest.text is None:
        longest = min(manifest.encoder.max_tokens if manifest.encoder else RUN_TOKENS, RUN_TOKENS)
        activations = _activations(folder / "config.json", longest)
        return Estimate(
            sizing.footprint(manifest.runtime, found.by_type, activation_bytes=activations),
        )
    architecture = manifest.text.architecture or found.architecture
    kv = None
    if architecture is not None:
        kv = sizing.KvCache.of(architecture, found.kv_precision or DEFAULT_KV_PRECISION)
    in_memory = 0 if manifest.runtime == "tensorrt-llm" else kv_cache_bytes  # or on the GPU
    graphs = 0
    if manifest.text.guesses:
        graphs = 1 + len(guesses.widths(sum(found.by_type.values()), manifest.text.guesses))
    if graphs and kv is not None:
        in_memory += kv.bytes_of(MOST_TOKENS)
    footprint = sizing.footprint(
        manifest.runtime, found.by_type, gguf=found.gguf, guessing_graphs=graphs, kv_cache_bytes=in_memory
    )
    return Estimate(footprint, architecture, kv)


def _activations(config: Path, length: int) -> int:
    """Of a full run, by the checkpoint's own config.json; 0 where there is none."""
    try:
        said: dict[str, Any] = json.loads(config.read_text())
        hidden, heads = int(said["hidden_size"]), int(said["num_attention_heads"])
        intermediate = int(said.get("intermediate_size", 4 * hidden))
    except (OSError, ValueError, LookupError, TypeError):
        return 0
    return sizing.encoder_activations(RUN_TOKENS, length, hidden, intermediate, heads)
