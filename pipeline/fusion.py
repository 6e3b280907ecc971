"""Matrix products of one input joined into one product: q, k and v of a layer, gate and up.

With one stream alone, starting a product on all cores costs about as much as computing it. A row of weights
is multiplied as before, and quantised as before: groups of INT4 lie along a row (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino
from openvino import opset13 as ops


def fuse_products(model: openvino.Model) -> int:
    """Joins, in place, the products with constants of shape (rows, inputs) that multiply the same input; of a
    graph whose weights are not quantised yet. Returns how many products there are less."""
    alike: dict[tuple[str, int, str], list[tuple[openvino.Node, openvino.Node]]] = {}
    for node in model.get_ordered_ops():
        matrix = _matrix(node)
        if matrix is not None:
            source = node.input_value(0)
            kind = matrix.get_element_type().get_type_name()
            key = (source.get_node().get_name(), source.get_index(), kind)
            alike.setdefault(key, []).append((node, matrix))
    groups = [products for products in alike.values() if len(products) > 1]
    for products in groups:
        _join(products)
    model.validate_nodes_and_infer_types()
    return sum(len(products) - 1 for products in groups)


def _join(products: Sequence[tuple[openvino.Node, openvino.Node]]) -> None:
    matrices = [matrix for _, matrix in products]
    weights = ops.constant(np.concatenate([matrix.data for matrix in matrices]))
    weights.set_friendly_name("+".join(matrix.get_friendly_name() for matrix in matrices))
    joined = ops.matmul(products[0][0].input_value(0), ops.convert(weights, "f32"), False, True)
    parts = ops.variadic_split(joined, -1, [matrix.shape[0] for matrix in matrices])
    for (node, _), part in zip(products, parts.outputs(), strict=True):
        node.output(0).replace(part)


def _matrix(node: openvino.Node) -> openvino.Node | None:
    """The constant of a product as OpenVINO GenAI writes it: a matrix that a Convert makes FP32."""
    if node.get_type_name() != "MatMul":
        return None
    told = node.get_attributes()
    convert = node.input_value(1).get_node()
    if told["transpose_a"] or not told["transpose_b"] or convert.get_type_name() != "Convert":
        return None
    constant = convert.input_value(0).get_node()
    is_matrix = constant.get_type_name() == "Constant" and len(constant.shape) == 2
    return constant if is_matrix else None
