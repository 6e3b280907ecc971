"""Encoders (vectors, labels, answers) inside Triton: ONNX Runtime or OpenVINO on CPU, fed by its dynamic
batcher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from services.inference.artifact import EncoderSpec, Manifest
from services.inference.backends.runs import padding, runs
from services.inference.backends.spans import VectorSpans
from services.inference.runtimes import open_encoder

# What a token that is padding gets, where each token gets something: no softmax ever chooses it.
LOWEST = float(np.finfo(np.float32).min)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Block:
    """A request: its tensors by name, INT64 [texts, tokens], and how long each text is without the padding
    behind it."""

    tensors: Mapping[str, Ints]
    lengths: list[int]
    width: int


class TritonPythonModel:
    """Triton's interface: initialize, execute, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = Manifest.read(folder)
        spec = manifest.encoder
        if spec is None:
            raise pb_utils.TritonModelException("the artifact's manifest describes no encoder")
        self._spec: EncoderSpec = spec
        self._runtime = open_encoder(manifest.runtime, folder / spec.weights, tuple(spec.outputs))
        endpoint = config["parameters"].get("otlp_endpoint", {}).get("string_value", "")
        self._spans = VectorSpans(endpoint, config["name"])
        self._figures = _Figures(config["name"], args["model_version"])

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
            for index, outputs in self._computed(blocks).items():
                tensors = [pb_utils.Tensor(name, values) for name, values in outputs.items()]
                responses[index] = pb_utils.InferenceResponse(tensors)
        return responses

    def _block(self, request: Any) -> Block:
        """The request's rows. Raises ValueError for what would fail, and with it all others of its run."""
        tensors = {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._spec.inputs
        }
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        for name, tensor in tensors.items():
            if tensor.shape != ids.shape:
                raise ValueError(f"{name}: its shape {tensor.shape} is not that of input_ids, {ids.shape}")
        if not 1 <= ids.shape[1] <= self._spec.max_tokens:
            raise ValueError(f"input_ids: {ids.shape[1]} tokens, but 1 to {self._spec.max_tokens} are read")
        if ids.min() < 0 or ids.max() >= self._spec.vocabulary:
            raise ValueError(f"input_ids: token ids are 0 to {self._spec.vocabulary - 1}")
        types = tensors.get("token_type_ids")
        if types is not None and (types.min() < 0 or types.max() > 1):
            raise ValueError("token_type_ids: 0 for the question, 1 for the context")
        width = int(ids.shape[1])
        # Behind the last token that counts; nothing is computed for what comes after it.
        lengths = width - np.argmax(mask[:, ::-1] != 0, axis=1)
        return Block(tensors, np.where(mask.any(axis=1), lengths, width).tolist(), width)

    def _computed(self, blocks: Mapping[int, Block]) -> dict[int, dict[str, Floats]]:
        """Outputs by request."""
        rows = [(index, row) for index, block in blocks.items() for row in range(len(block.lengths))]
        lengths = [blocks[index].lengths[row] for index, row in rows]
        found = {index: self._empty(block) for index, block in blocks.items()}
        for run in runs(lengths):
            width = lengths[run[0]]
            tensors = {name: np.zeros((len(run), width), np.int64) for name in self._spec.inputs}
            for at, item in enumerate(run):
                index, row = rows[item]
                for name, tensor in tensors.items():
                    tensor[at, : lengths[item]] = blocks[index].tensors[name][row, : lengths[item]]
            outputs = self._runtime.run(tensors)
            for at, item in enumerate(run):
                index, row = rows[item]
                for name, each in self._spec.outputs.items():
                    if each < 0:
                        found[index][name][row, : lengths[item]] = outputs[name][at, : lengths[item]]
                    else:
                        found[index][name][row] = outputs[name][at]
            self._figures.add(len(run), len(run) * width, padding(lengths, run))
        return found

    def _empty(self, block: Block) -> dict[str, Floats]:
        return {
            name: np.full((len(block.lengths), block.width if each < 0 else each), LOWEST, np.float32)
            for name, each in self._spec.outputs.items()
        }


class _Figures:
    """Counters on Triton's metrics port."""

    def __init__(self, model: str, version: str) -> None:
        self._families = [
            pb_utils.MetricFamily(
                name=f"lingqu_encoder_{name}_total",
                description=description,
                kind=pb_utils.MetricFamily.COUNTER,
            )
            for name, description in (
                ("runs", "Runs of an encoder's graph"),
                ("rows", "Texts, or windows of them, in these runs"),
                ("tokens", "Tokens of these runs, padding included"),
                ("padding", "Tokens of these runs that were padding"),
            )
        ]  # a metric does not outlive its family
        labels = {"model": model, "version": version}
        self._metrics = [family.Metric(labels=labels) for family in self._families]

    def add(self, rows: int, tokens: int, padded: int) -> None:
        for metric, value in zip(self._metrics, (1, rows, tokens, padded), strict=True):
            metric.increment(value)
