"""Weights of GGUF files in the one form that the CPU engine computes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

FILE_TYPE_F16 = 1  # llama.cpp's LLAMA_FTYPE_MOSTLY_F16


def write_f16(reader: GGUFReader, path: Path) -> None:
    """Write the same model with every quantised tensor as FP16 of the values it stands for.

    OpenVINO GenAI rounds the offsets of Q4_1 blocks and quantises activations for integer weights: with the
    bundled model its greedy tokens then differ from the first on, while FP16 gives the reference's
    (docs/decisions.md has the figures)."""
    writer = GGUFWriter(str(path), _contents(reader, "general.architecture"))
    copy_fields(reader, writer, {"general.file_type": FILE_TYPE_F16})
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_fields(reader: GGUFReader, writer: GGUFWriter, instead: Mapping[str, Any]) -> None:
    """What the file says of the model, with other values where `instead` has them."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = instead[name] if name in instead else field.contents()
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=element)


def _contents(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the GGUF file says nothing about {name}")
    return field.contents()
