"""What computes an encoder's graph, behind one small interface, chosen by the artifact's runtime.

On CPU ONNX Runtime and OpenVINO read the same ONNX file. TensorRT is not here: Triton itself runs its plans
(services/inference/tensorrt).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Tensors = Mapping[str, npt.NDArray[Any]]


class EncoderRuntime(Protocol):
    """A graph that is loaded. `run` may be called by one thread at a time."""

    def run(self, inputs: Tensors) -> Tensors:
        """All outputs by name, for the inputs by name: INT64 [rows, tokens], any number of either."""


class UnknownRuntime(ValueError):
    """No runtime of that name computes graphs here."""


def open_encoder(
    runtime: str, graph: Path, outputs: Sequence[str], threads: int | None = None
) -> EncoderRuntime:
    """Load an ONNX file. `threads`: default, all processors. Raises UnknownRuntime, and what the runtime
    raises for a file that it cannot read."""
    threads = threads or os.cpu_count() or 1
    if runtime == "onnxruntime":
        from services.inference.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(graph, outputs, threads)
    if runtime == "openvino":
        from services.inference.runtimes.openvino import OpenVino

        return OpenVino(graph, outputs, threads)
    raise UnknownRuntime(f'"{runtime}" computes no encoders in this process')
