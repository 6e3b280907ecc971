"""Any model for Triton's Python backend, with its own config.pbtxt, as an artifact.

Such an artifact contains code that Triton will run: publish only what you would run yourself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from pipeline.package import About, Package, digests, seal, staging_folder
from services.inference.artifact import Manifest, Signature, TensorSignature, TensorSpec


def package_tensor(folder: Path, store: Path, about: About = About()) -> Package:  # noqa: B008 - immutable
    """`folder` holds config.pbtxt, model.py and whatever they need."""
    for name in ("config.pbtxt", "model.py"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}/{name} is missing")
    staging = staging_folder(store)
    shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    manifest = Manifest(
        task="tensor",
        runtime="python",
        files=digests(staging),
        tensor=TensorSpec(config="config.pbtxt", model="model.py"),
        signature=_signature((staging / "config.pbtxt").read_text()),
        **about.parts,
    )
    return seal(staging, manifest, store)


def _signature(text: str) -> Signature:
    """Inputs and outputs of a config.pbtxt; none if it cannot be read: the agent will say why."""
    try:
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        batch = (-1,) if config.max_batch_size > 0 else ()
        return Signature(
            inputs=tuple(_tensor(one, batch) for one in config.input),
            outputs=tuple(_tensor(one, batch) for one in config.output),
        )
    except (text_format.ParseError, ValueError):
        return Signature()


def _tensor(described: Any, batch: tuple[int, ...]) -> TensorSignature:
    datatype = model_config_pb2.DataType.Name(described.data_type).removeprefix("TYPE_")
    if datatype == "STRING":
        datatype = "BYTES"  # its name in the protocol
    return TensorSignature(name=described.name, datatype=datatype, shape=(*batch, *described.dims))
