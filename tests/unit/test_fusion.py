"""Joined products compute what they computed apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops

from pipeline.fusion import fuse_products

HIDDEN = 16
WHOLE = np.random.default_rng(0)  # small whole numbers: sums are exact in whatever order they are made


def product(source: Any, rows: int, transposed: bool = True) -> Any:
    shape = (rows, HIDDEN) if transposed else (HIDDEN, rows)
    weights = ops.constant(WHOLE.integers(-3, 4, shape).astype(np.float16))
    return ops.matmul(source, ops.convert(weights, "f32"), False, transposed)


def graph() -> openvino.Model:
    """Three that belong together, one after a nonlinearity, two that are no weights as we know them."""
    x = ops.parameter([-1, -1, HIDDEN], np.float32, name="x")
    q, k, v = product(x, HIDDEN), product(x, 4), product(x, 8)
    other = product(ops.relu(q), HIDDEN)
    turned = product(x, 5, transposed=False)
    plain = ops.matmul(x, ops.constant(np.ones((3, HIDDEN), np.float32)), False, True)
    return openvino.Model([q, k, v, other, turned, plain], [x], "test")


def computed(model: openvino.Model, x: Any) -> list[Any]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled(x).values()]


def test_joined_products_compute_the_same() -> None:
    model = graph()
    inputs = [WHOLE.integers(-4, 5, (*shape, HIDDEN)).astype(np.float32) for shape in ((1, 1), (2, 7))]
    apart = [computed(model, x) for x in inputs]
    assert fuse_products(model) == 2
    for x, before in zip(inputs, apart, strict=True):
        after = computed(model, x)
        assert len(after) == len(before) == 6
        assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))


def test_only_products_of_one_input_with_matrices_are_joined() -> None:
    model = graph()
    fuse_products(model)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("MatMul") == 4  # of six: q, k and v are one
    assert kinds.count("VariadicSplit") == 1
    assert fuse_products(model) == 0
