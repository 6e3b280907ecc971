"""Text models as OpenVINO IR: weights in FP16, INT8 or INT4, the tokenizer, and a twin that tries grammars.

IR rather than GGUF, because OpenVINO maps its weights from the file (versions share them, loading is twice as
fast), because NNCF's quantisation keeps what OpenVINO's reader of quantised GGUF loses, and because scoring
needs the graph itself (docs/decisions.md has the figures).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as og
from gguf import GGUFReader, GGUFWriter

from pipeline.fusion import fuse_products
from pipeline.package import Precision
from pipeline.weights import copy_fields, write_f16

MODEL = "openvino_model.xml"
GRAMMAR = "grammar"
INT4_GROUP = 64
TINY = 64  # hidden size and length of a head of the twin


def write_model(reader: GGUFReader, folder: Path, precision: Precision) -> None:
    """`MODEL` and its weights, with few and large products (fusion.py). INT8 and INT4 are weights only,
    asymmetric; embeddings and the last layer are INT8 in both."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        write_f16(reader, gguf)
        _to_ir(gguf)
        model = openvino.Core().read_model(gguf.parent / MODEL)
        fuse_products(model)
        if precision == "fp16":
            openvino.save_model(model, folder / MODEL)
            return
        import nncf  # takes seconds, and most models need none of it

        modes = {
            "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
            "int4": {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": INT4_GROUP, "ratio": 1.0},
        }
        openvino.save_model(nncf.compress_weights(model, **modes[precision]), folder / MODEL)


def write_tokenizer(tokenizer: Any, eos: Sequence[int], folder: Path) -> None:
    """The tokenizer as OpenVINO runs it, which grammars are compiled against, and what ends an answer."""
    from openvino_tokenizers import convert_tokenizer

    encode, decode = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(encode, folder / "openvino_tokenizer.xml")
    openvino.save_model(decode, folder / "openvino_detokenizer.xml")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": list(eos)}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(eos)}))


def write_grammar_model(reader: GGUFReader, folder: Path) -> None:
    """A model with the same vocabulary and next to no weights, which computes nonsense in no time: whether
    the engine can follow a grammar is tried with it, and not where one it cannot follow would break every
    stream."""
    architecture = str(field(reader, "general.architecture"))
    small = {
        "block_count": 1,
        "embedding_length": TINY,
        "feed_forward_length": TINY,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "attention.key_length": TINY,
        "attention.value_length": TINY,
        "rope.dimension_count": TINY,
    }
    vocabulary = len(field(reader, "tokenizer.ggml.tokens"))
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        writer = GGUFWriter(str(gguf), architecture)
        copy_fields(reader, writer, {f"{architecture}.{name}": value for name, value in small.items()})
        shapes = {"token_embd": (vocabulary, TINY), **{f"blk.0.{name}": (TINY, TINY) for name in matrices}}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.02).astype(np.float16))
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(TINY, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _to_ir(gguf)
        folder.mkdir()
        for part in (MODEL, _weights(MODEL)):
            (gguf.parent / part).rename(folder / part)


def field(reader: GGUFReader, name: str) -> Any:
    """Raises ValueError if the file does not say it."""
    found = reader.get_field(name)
    if found is None:
        raise ValueError(f"the GGUF file says nothing about {name}")
    return found.contents()


def _to_ir(gguf: Path) -> None:
    """Writes MODEL beside the file: OpenVINO GenAI builds the graph as it would to run it."""
    scheduler = og.SchedulerConfig()
    scheduler.num_kv_blocks = 16
    og.ContinuousBatchingPipeline(str(gguf), scheduler, "CPU", {"enable_save_ov_model": True})
    if not (gguf.parent / MODEL).is_file():
        raise RuntimeError("OpenVINO GenAI has not written the model it read")


def _weights(model: str) -> str:
    return Path(model).with_suffix(".bin").name
