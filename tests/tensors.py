"""Small tensor models for tests: their answer is the number of their version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from pipeline.package import Package
from pipeline.tensor import package_tensor

MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        tensor = pb_utils.Tensor("VERSION", np.array([[{version}]], dtype=np.int32))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""
CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "INPUT" data_type: TYPE_INT32 dims: [ 2 ] } ]
output [ { name: "VERSION" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def made(tmp_path: Path, version: int, body: str = "") -> Package:
    """An artifact whose model answers with its version."""
    folder = tmp_path / f"source{version}"
    folder.mkdir()
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "model.py").write_text(body or MODEL.format(version=version))
    return package_tensor(folder, tmp_path / "made")


def pair(shape: tuple[int, ...] = (1, 2), kind: str = "INT32") -> list[Any]:
    found = triton.InferInput("INPUT", list(shape), kind)
    found.set_data_from_numpy(np.zeros(shape, np.int32 if kind == "INT32" else np.float32))
    return [found]


def version_of(answer: Any) -> int:
    """Which version gave this answer."""
    return int(answer.as_numpy("VERSION")[0, 0])
