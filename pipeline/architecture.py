"""The figures of a decoder that its memory follows from, out of a GGUF file's description."""

from __future__ import annotations

from gguf import GGUFReader

from services.inference.artifact import Architecture


def architecture(reader: GGUFReader) -> Architecture | None:
    """None where the file does not say, or where layers differ: then nothing can be multiplied."""
    family = _value(reader, "general.architecture")
    layers = _value(reader, f"{family}.block_count")
    hidden = _value(reader, f"{family}.embedding_length")
    heads = _value(reader, f"{family}.attention.head_count")
    if not isinstance(layers, int) or not isinstance(hidden, int) or not isinstance(heads, int):
        return None
    kv_heads = _value(reader, f"{family}.attention.head_count_kv") or heads
    head_dim = _value(reader, f"{family}.attention.key_length") or hidden // heads
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        return None
    return Architecture(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _value(reader: GGUFReader, name: str) -> object:
    field = reader.get_field(name)
    return field.contents() if field is not None else None
