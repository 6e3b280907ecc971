"""The graph of a text model for one sequence, with a paged cache that nobody else has: what OpenVINO GenAI's
pipeline runs, run by hand.

Every length may be computed; the lengths named in advance have a graph of their own, whose shapes are fixed.
There the engine asks no operation anew for its shapes, which takes a fifth to a quarter of a step of a small
model (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

BLOCK_TOKENS = 32  # of the CPU plugin's paged attention

_CACHES = ("key_cache", "value_cache")
_SAMPLED = "sampled"


class Paged:
    """`weights` is an openvino_model.xml, `tokens` how many a sequence has at most, `widths` the lengths with
    graphs of their own. Raises ValueError for a graph that is not one of a text model."""

    def __init__(self, weights: Path, tokens: int, widths: Sequence[int] = ()) -> None:
        blocks = -(-tokens // BLOCK_TOKENS)
        self._tokens = blocks * BLOCK_TOKENS
        core = openvino.Core()
        self._any = _Run(_compiled(core, weights, blocks, None), blocks, {})
        self._fixed = {
            width: _Run(_compiled(core, weights, blocks, width), blocks, self._any.caches) for width in widths
        }

    def likeliest(self, ids: Sequence[int], past: int, wanted: int) -> list[int]:
        """The likeliest token after each of the last `wanted` of `ids`, which come behind `past` tokens that
        were computed before; what was computed behind those is forgotten. The first of those that are equally
        likely, as the pipeline chooses. Raises ValueError for more tokens than a sequence may have."""
        if past + len(ids) > self._tokens:  # the engine would write behind its cache
            raise ValueError(f"{past + len(ids)} tokens do not fit the cache, which holds {self._tokens}")
        run = self._fixed.get(len(ids), self._any)
        return run.compute(ids, past, wanted)


class _Run:
    """A compiled graph with its inputs."""

    def __init__(
        self, compiled: openvino.CompiledModel, blocks: int, caches: dict[str, openvino.Tensor]
    ) -> None:
        self.caches = caches  # of all graphs of a model together
        self._request = compiled.create_infer_request()
        self._names = {port.any_name for port in compiled.inputs}
        for port in compiled.inputs:
            if port.any_name.startswith(_CACHES):
                if port.any_name not in caches:
                    shape = [blocks, *(dim.get_length() for dim in list(port.partial_shape)[1:])]
                    caches[port.any_name] = openvino.Tensor(port.element_type, shape)
                self._request.set_tensor(port.any_name, caches[port.any_name])
        self._set("subsequence_begins", np.zeros(2, np.int32))
        self._set("block_indices", np.arange(blocks, dtype=np.int32))

    def compute(self, ids: Sequence[int], past: int, wanted: int) -> list[int]:
        count, end = len(ids), past + len(ids)
        self._set("input_ids", np.array(ids, np.int64))
        self._set("position_ids", np.arange(past, end, dtype=np.int64))
        self._set("past_lens", np.array([past], np.int32))
        self._set("subsequence_begins", np.array([0, count], np.int32))
        self._set("block_indices_begins", np.array([0, -(-end // BLOCK_TOKENS)], np.int32))
        self._set("max_context_len", np.array(end, np.int32))
        if _SAMPLED in self._names:
            self._set(_SAMPLED, np.arange(count - wanted, count, dtype=np.int32))
        self._request.infer()
        logits = self._request.get_output_tensor(0).data
        found: list[int] = logits.reshape(-1, logits.shape[-1])[-wanted:].argmax(axis=-1).tolist()
        return found

    def _set(self, name: str, value: npt.NDArray[Any]) -> None:
        self._request.set_tensor(name, openvino.Tensor(value))


def _compiled(core: openvino.Core, weights: Path, blocks: int, width: int | None) -> openvino.CompiledModel:
    """For steps of `width` tokens, or of any number of which some are sampled."""
    model = core.read_model(weights)
    paged_attention_transformation(model, False, False)
    parameters = {parameter.output(0).get_any_name(): parameter for parameter in model.get_parameters()}
    for name, parameter in parameters.items():
        if name.startswith(_CACHES):
            parameter.set_element_type(openvino.Type.dynamic)  # as the plugin likes it
            parameter.set_partial_shape(openvino.PartialShape([-1 if width is None else blocks, -1, -1, -1]))
    if width is None:
        _sample(model)
    else:
        shapes = {"input_ids": width, "position_ids": width, "past_lens": 1, "subsequence_begins": 2}
        shapes |= {"block_indices": blocks, "block_indices_begins": 2}
        for name, length in shapes.items():
            parameters[name].set_partial_shape(openvino.PartialShape([length]))
    model.validate_nodes_and_infer_types()
    return core.compile_model(model, "CPU")


def _sample(model: openvino.Model) -> None:
    """The last product is computed of the tokens only whose numbers the input `_SAMPLED` has."""
    product = model.get_results()[0].input_value(0).get_node()
    if product.get_type_name() != "MatMul":
        raise ValueError(f"the graph ends with {product.get_type_name()}, not with a product")
    sampled = ops.parameter([-1], np.int32, name=_SAMPLED)
    sampled.output(0).set_names({_SAMPLED})
    rows = ops.gather(product.input_value(0), sampled, ops.constant(0, dtype=np.int32))
    product.input(0).replace_source_output(rows.output(0))
    model.add_parameters([sampled])
