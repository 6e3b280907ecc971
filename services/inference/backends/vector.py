"""The vector model inside Triton: ONNX Runtime or OpenVINO on CPU, fed by Triton's dynamic batcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from services.inference.artifact import Manifest
from services.inference.backends.spans import VectorSpans
from services.inference.runtimes import open_encoder

# Tokens, padding included, of one run of the graph: 16 texts of 256 tokens.
MAX_RUN_TOKENS = 4096

Block = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""input_ids and attention_mask of a request, INT64 [texts, tokens]."""


class TritonPythonModel:
    """Triton's interface: initialize, execute, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = Manifest.read(folder)
        spec = manifest.vector
        if spec is None:
            raise pb_utils.TritonModelException("the artifact's manifest describes no vector model")
        self._spec = spec
        self._runtime = open_encoder(manifest.runtime, folder / spec.weights, ("embedding",))
        endpoint = config["parameters"].get("otlp_endpoint", {}).get("string_value", "")
        self._spans = VectorSpans(endpoint, config["name"])

    def finalize(self) -> None:
        self._spans.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Requests of all callers in few runs: rows are padded to the longest of their run and given back to
        their owners. A request that the model cannot compute is refused alone."""
        responses: list[Any] = [None] * len(requests)
        blocks: dict[int, Block] = {}
        for index, request in enumerate(requests):
            try:
                blocks[index] = self._block(request)
            except ValueError as err:
                error = pb_utils.TritonError(str(err), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=error)
        with self._spans.batch([request.parameters() for request in requests]):
            for index, vectors in self._embedded(blocks).items():
                responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor("embedding", vectors)])
        return responses

    def _block(self, request: Any) -> Block:
        """The request's rows. Raises ValueError for what would fail, and with it all others of its run."""
        ids, mask = _input(request, "input_ids"), _input(request, "attention_mask")
        if ids.shape != mask.shape:
            raise ValueError(f"attention_mask: its shape {mask.shape} is not that of input_ids, {ids.shape}")
        if not 1 <= ids.shape[1] <= self._spec.max_tokens:
            raise ValueError(f"input_ids: {ids.shape[1]} tokens, but 1 to {self._spec.max_tokens} are read")
        if ids.min() < 0 or ids.max() >= self._spec.vocabulary:
            raise ValueError(f"input_ids: token ids are 0 to {self._spec.vocabulary - 1}")
        return ids, mask

    def _embedded(self, blocks: dict[int, Block]) -> dict[int, npt.NDArray[np.float32]]:
        """Vectors by request. Runs are bounded in tokens, so that memory is, and hold rows of like length."""
        rows = [(index, row) for index, (ids, _) in blocks.items() for row in range(len(ids))]
        rows.sort(key=lambda at: blocks[at[0]][0].shape[1], reverse=True)
        found = {i: np.empty((len(ids), self._spec.dimensions), np.float32) for i, (ids, _) in blocks.items()}
        while rows:
            width = blocks[rows[0][0]][0].shape[1]  # the longest that is left
            size = max(1, MAX_RUN_TOKENS // width)
            run, rows = rows[:size], rows[size:]
            ids, mask = np.zeros((len(run), width), np.int64), np.zeros((len(run), width), np.int64)
            for at, (index, row) in enumerate(run):
                length = blocks[index][0].shape[1]
                ids[at, :length], mask[at, :length] = (part[row] for part in blocks[index])
            vectors = self._runtime.run({"input_ids": ids, "attention_mask": mask})["embedding"]
            for at, (index, row) in enumerate(run):
                found[index][row] = vectors[at]
        return found


def _input(request: Any, name: str) -> npt.NDArray[np.int64]:
    block: npt.NDArray[np.int64] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return block
