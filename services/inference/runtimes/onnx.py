"""ONNX Runtime on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from services.inference.runtimes import Tensors


class OnnxRuntime:
    def __init__(self, graph: Path, outputs: Sequence[str], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin for work between two batches would take the cores from everything else.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._outputs = list(outputs)
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Tensors) -> Tensors:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))
