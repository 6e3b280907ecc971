"""What a model takes: memory for its weights, for each token in the KV cache, and how much fits. Pure
arithmetic; weights.py reads the figures out of an artifact.

The engine's own share is estimated with factors that were measured with the engines named beside them
(docs/operations.md says how far off they are); the KV cache's figures are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.inference.artifact import Architecture

MIB = 1 << 20
BLOCK_TOKENS = 32  # of OpenVINO's CPU plugin; a sequence takes whole blocks
KV_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
# Bytes in memory for each byte of weights in the file, by type. OpenVINO GenAI 2026.4 on CPU keeps f16
# weights mapped, in bf16 or f32, and packed for its kernels; compressed ones mapped and packed. ONNX Runtime
# keeps f32 as it is.
RESIDENT = {
    "openvino-genai": {"f16": 3.1, "bf16": 3.1, "f32": 2.0},
    "onnxruntime": {},
    "openvino": {"f16": 2.0},
}
RESIDENT_OTHERWISE = {"openvino-genai": 2.1, "onnxruntime": 1.1, "openvino": 1.6}
GUESSING = 1.2  # more, packed for each graph of a stream that is alone (backends/guessing.py)
GGUF_CONVERSION = 0.6  # more, while a GGUF file is turned into the engine's own form
FIXED = {"openvino-genai": 280 * MIB, "onnxruntime": 110 * MIB, "openvino": 150 * MIB}
FIXED_OTHERWISE = 60 * MIB  # a Python process with nothing in it


@dataclass(frozen=True, slots=True)
class KvCache:
    """The cache of a text model: bytes of one token over all layers, exactly as the engine allots them."""

    precision: str
    bytes_per_token: int
    block_tokens: int = BLOCK_TOKENS

    @classmethod
    def of(cls, architecture: Architecture, precision: str) -> KvCache:
        """In u8, keys have a scale and a zero point (f32) per channel and block, values per token."""
        size, vectors = architecture.head_dim, architecture.layers * architecture.kv_heads
        if precision == "u8":
            return cls(precision, vectors * (size + size * 8 // BLOCK_TOKENS + size + 8))
        return cls(precision, vectors * 2 * size * KV_BYTES[precision])

    def blocks(self, cache_bytes: int) -> int:
        return cache_bytes // (self.bytes_per_token * self.block_tokens)

    def sequences(self, cache_bytes: int, tokens: int) -> int:
        """How many sequences of so many tokens, prompt and answer together, fit at once."""
        return self.blocks(cache_bytes) // max(1, -(-tokens // self.block_tokens))

    def longest(self, cache_bytes: int) -> int:
        """Tokens of the longest sequence that fits alone."""
        return self.blocks(cache_bytes) * self.block_tokens

    def bytes_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens) * self.block_tokens * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of memory that a loaded version takes, at most. `weights` are those in the file, by type;
    `resident` what they take in the engine; `fixed` the process and the engine without any weights."""

    weights: Mapping[str, int]
    resident: int
    fixed: int
    kv_cache: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.resident + self.fixed + self.kv_cache + self.activations


def footprint(
    runtime: str,
    weights: Mapping[str, int],
    *,
    gguf: bool = False,
    guessing_graphs: int = 0,
    kv_cache_bytes: int = 0,
    activation_bytes: int = 0,
) -> Footprint:
    factors, otherwise = RESIDENT.get(runtime, {}), RESIDENT_OTHERWISE.get(runtime, 1.0)
    resident = sum(size * factors.get(kind, otherwise) for kind, size in weights.items())
    resident += (GGUF_CONVERSION * gguf + GUESSING * guessing_graphs) * sum(weights.values())
    fixed = FIXED.get(runtime, FIXED_OTHERWISE)
    return Footprint(dict(weights), int(resident), fixed, kv_cache_bytes, activation_bytes)


def encoder_activations(tokens: int, length: int, hidden: int, intermediate: int, heads: int) -> int:
    """Bytes of what one run of an encoder keeps at once, in f32: `tokens` in rows of `length`. States, query,
    key, value and their sum, the feed-forward layer before and behind its activation, the scores thrice."""
    return 4 * tokens * (6 * hidden + 2 * intermediate + 3 * heads * length)


def unfit(needed: Footprint, available_bytes: int) -> str | None:
    """Why a version must not be loaded into so much memory; None if it may."""
    if needed.total <= available_bytes:
        return None
    parts = {
        "weights": needed.resident,
        "KV cache": needed.kv_cache,
        "activations": needed.activations,
        "engine": needed.fixed,
    }
    words = ", ".join(f"{name} {mib(size)}" for name, size in parts.items() if size)
    return f"it needs {mib(needed.total)} of memory ({words}), and {mib(available_bytes)} are available here"


def never_fits(tokens: int, kv: KvCache, cache_bytes: int) -> str | None:
    """Why a sequence of so many tokens, prompt and answer together, could not be finished even alone; None if
    it could."""
    if tokens <= kv.longest(cache_bytes):
        return None
    return f"{tokens} tokens do not fit the KV cache, which holds {kv.longest(cache_bytes)}"


def mib(size: int) -> str:
    """ "43 MiB", "1.5 GiB"."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / MIB:.0f} MiB"
