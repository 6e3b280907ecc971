"""What is in a file of weights: bytes by type, and the architecture where the file says it. GGUF, OpenVINO IR
and safetensors are read by their headers, ONNX by its initialisers if the package onnx is there."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from services.inference.artifact import Architecture

# Type → name, weights in a block, bytes of a block (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
_GGUF_TYPES = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36), 10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292), 24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8),
    28: ("f64", 1, 8), 30: ("bf16", 1, 2),
}  # fmt: skip
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 31  # no string or array of a header is longer: a damaged file must not take all memory


class UnreadableWeights(ValueError):
    """The file is not what its name says; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes by type. `kv_precision` is "" where the file leaves it to the engine."""

    by_type: Mapping[str, int]
    architecture: Architecture | None = None
    kv_precision: str = ""
    gguf: bool = False

    @property
    def bytes(self) -> int:
        return sum(self.by_type.values())


def read(path: Path) -> Weights:
    """Raises UnreadableWeights, OSError."""
    try:
        if path.suffix == ".gguf":
            with path.open("rb") as file:
                return _gguf(file)
        if path.suffix == ".xml":
            return _openvino(path)
        if path.suffix == ".onnx":
            return _onnx(path)
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return _safetensors(path)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, ElementTree.ParseError) as err:
        raise UnreadableWeights(f"{path.name}: {err}") from err
    return Weights({"unknown": path.stat().st_size})


def _gguf(file: BinaryIO) -> Weights:
    if file.read(4) != b"GGUF":
        raise ValueError("it is no GGUF file")
    _, tensors, pairs = struct.unpack("<IQQ", file.read(20))
    said: dict[str, Any] = {}
    for _ in range(pairs):
        name = _string(file)
        said[name] = _value(file, _scalar(file, "I"))
    sizes: Counter[str] = Counter()
    for _ in range(tensors):
        _string(file)
        shape = struct.unpack(f"<{(rank := _scalar(file, 'I'))}Q", file.read(8 * rank))
        kind, per_block, size = _GGUF_TYPES[_scalar(file, "I")]
        _scalar(file, "Q")
        count = 1
        for length in shape:
            count *= length
        sizes[kind] += count // per_block * size
    # What OpenVINO GenAI compiles from a GGUF file keeps its cache in f16.
    return Weights(dict(sizes), _gguf_architecture(said), "f16", gguf=True)


def _gguf_architecture(said: Mapping[str, Any]) -> Architecture | None:
    family = said.get("general.architecture", "")
    layers, hidden, heads = (
        said.get(f"{family}.{name}") for name in ("block_count", "embedding_length", "attention.head_count")
    )
    if not (isinstance(layers, int) and isinstance(hidden, int) and isinstance(heads, int)):
        return None
    kv_heads = said.get(f"{family}.attention.head_count_kv", heads)
    head_dim = said.get(f"{family}.attention.key_length", hidden // heads)
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        return None  # they differ by layer
    return Architecture(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, "Q")
    if length > _MOST:
        raise ValueError(f"a string of {length} bytes in the header")
    return file.read(length).decode(errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """Arrays are skipped: their values are not needed."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _GGUF_SCALARS[kind])
    of, length = _scalar(file, "I"), _scalar(file, "Q")
    if length > _MOST:
        raise ValueError(f"an array of {length} values in the header")
    if of == _STRING:
        for _ in range(length):
            file.seek(_scalar(file, "Q"), 1)
    elif of == _ARRAY:
        raise ValueError("an array of arrays in the header")
    else:
        file.seek(length * struct.calcsize(f"<{_GGUF_SCALARS[of]}"), 1)
    return None


def _openvino(path: Path) -> Weights:
    """Constants, and a decoder's states: a key and a value for each layer, [batch, heads, tokens, size]."""
    sizes: Counter[str] = Counter()
    states: dict[str, tuple[int, int]] = {}
    precision = ""
    for _, element in ElementTree.iterparse(path):  # noqa: S314 - artifacts are verified; expat is patched
        if element.tag == "layer" and (data := element.find("data")) is not None:
            if element.get("type") == "Const":
                sizes[data.get("element_type", "unknown")] += int(data.get("size", 0))
            elif element.get("type") == "ReadValue" and (shape := data.get("variable_shape", "")).count(","):
                axes = shape.split(",")
                if len(axes) == 4 and axes[1].isdigit() and axes[3].isdigit():
                    states[data.get("variable_id", "")] = int(axes[1]), int(axes[3])
            element.clear()
        elif element.tag == "KV_CACHE_PRECISION":
            precision = element.get("value", "")
    if not sizes:
        raise ValueError("it has no constants")
    found = None
    if states and len(set(states.values())) == 1 and len(states) % 2 == 0:
        ((kv_heads, head_dim),) = set(states.values())
        found = Architecture(
            layers=len(states) // 2,
            hidden=kv_heads * head_dim,  # the graph does not say how many query heads share one of these
            heads=kv_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )
    return Weights(dict(sizes), found, precision)


def _onnx(path: Path) -> Weights:
    try:
        import onnx
    except ImportError:  # it comes with lingqu[pipeline]
        return Weights({"unknown": path.stat().st_size})
    sizes: Counter[str] = Counter()
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        count = 1
        for length in tensor.dims:
            count *= length
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        sizes[_SHORT.get(kind.name, kind.name)] += count * kind.itemsize
    return Weights(dict(sizes))


def _safetensors(path: Path) -> Weights:
    """A file, or the index of several (https://huggingface.co/docs/safetensors). Their cache is in half
    precision, as they are."""
    files = [path]
    if path.suffix == ".json":
        said = json.loads(path.read_text())
        files = [path.parent / Path(str(name)).name for name in sorted(set(said["weight_map"].values()))]
    sizes: Counter[str] = Counter()
    for file in files:
        with file.open("rb") as opened:
            length = _scalar(opened, "Q")
            if length > _MOST:
                raise ValueError(f"a header of {length} bytes")
            for name, tensor in json.loads(opened.read(length)).items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    sizes[str(tensor["dtype"]).lower()] += int(end) - int(begin)
    return Weights(dict(sizes), kv_precision="f16")


_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
}
