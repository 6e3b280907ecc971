"""Encoders on NVIDIA GPUs: plans that TensorRT builds from the artifact's ONNX, which Triton runs itself.

Not run on a GPU yet; docs/gpu.md says what has been proven without one.
"""
