"""The vector model inside Triton: ONNX Runtime on CPU, fed by Triton's dynamic batcher."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import triton_python_backend_utils as pb_utils

from services.inference.artifact import Manifest
from services.inference.backends.spans import VectorSpans


class TritonPythonModel:
    """Triton's interface: initialize, execute, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        spec = Manifest.read(folder).vector
        if spec is None:
            raise pb_utils.TritonModelException("the artifact's manifest describes no vector model")
        self._spec = spec
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        # Threads that spin for work between two batches would take the cores from everything else.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(folder / spec.weights), options, providers=["CPUExecutionProvider"]
        )
        endpoint = config["parameters"].get("otlp_endpoint", {}).get("string_value", "")
        self._spans = VectorSpans(endpoint, config["name"])

    def finalize(self) -> None:
        self._spans.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run for all requests: rows are padded to the longest and given back to their owners."""
        with self._spans.batch([request.parameters() for request in requests]):
            ids = [_input(request, "input_ids") for request in requests]
            masks = [_input(request, "attention_mask") for request in requests]
            (vectors,) = self._session.run(
                ["embedding"], {"input_ids": _stacked(ids), "attention_mask": _stacked(masks)}
            )
        responses, row = [], 0
        for block in ids:
            part = vectors[row : row + len(block)]
            row += len(block)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("embedding", part)]))
        return responses


def _input(request: Any, name: str) -> npt.NDArray[np.int64]:
    block: npt.NDArray[np.int64] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return block


def _stacked(blocks: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Blocks [n_i, tokens_i] as one [sum of n_i, longest], padded with zeros, which the mask hides."""
    if len(blocks) == 1:
        return blocks[0]
    padded = np.zeros((sum(len(b) for b in blocks), max(b.shape[1] for b in blocks)), np.int64)
    row = 0
    for block in blocks:
        padded[row : row + len(block), : block.shape[1]] = block
        row += len(block)
    return padded
