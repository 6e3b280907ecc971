"""Builds one plan: python -m services.inference.tensorrt.build ONNX PLAN RECIPE.

A process of its own: TensorRT takes gigabytes while it chooses kernels, and may crash on a graph. It uses
TensorRT's Python API, not trtexec: profiles for several lengths and the strongly typed network are plain
calls there, and the package of the right version installs with pip.

Written against TensorRT 10 and 11 (https://docs.nvidia.com/deeplearning/tensorrt); not run on a GPU yet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def build(trt: Any, onnx: Path, plan: Path, recipe: dict[str, Any]) -> None:
    """`trt` is the module tensorrt. Raises RuntimeError with TensorRT's own words."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # The types are the graph's own: fp16 where it was exported so. The flag for fp16 was deprecated in 10.12
    # and is gone in 11, where all networks are typed like this.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"{onnx.name} cannot be parsed: {errors}")
    config = builder.create_builder_config()
    for shape in recipe["profiles"]:
        profile = builder.create_optimization_profile()
        for name in recipe["inputs"]:
            least = (1, shape["shortest"])
            best, most = (shape["best"], shape["longest"]), (shape["batch"], shape["longest"])
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError(f"TensorRT built nothing from {onnx.name}")
    plan.write_bytes(serialized)


def main() -> None:
    import tensorrt

    onnx, plan, recipe = map(Path, sys.argv[1:])
    build(tensorrt, onnx, plan, json.loads(recipe.read_text()))


if __name__ == "__main__":
    main()
