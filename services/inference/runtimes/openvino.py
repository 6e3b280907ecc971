"""OpenVINO on CPU, reading the same ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openvino

from services.inference.runtimes import Tensors


class OpenVino:
    def __init__(self, graph: Path, outputs: Sequence[str], threads: int) -> None:
        core = openvino.Core()
        # f32: left to itself it takes bf16 where the processor can, and vectors leave their golden cosine.
        compiled = core.compile_model(
            str(graph),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        self._request = compiled.create_infer_request()
        self._outputs = list(outputs)
        for name in self._outputs:
            compiled.output(name)  # raises if the graph has no such output

    def run(self, inputs: Tensors) -> Tensors:
        found = self._request.infer(dict(inputs), share_inputs=True)
        return {name: found[name].copy() for name in self._outputs}  # the request's memory is used again
