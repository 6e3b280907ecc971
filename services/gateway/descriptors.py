"""Which field of which request names the model, and the descriptors Envoy needs to read it."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2
from tritonclient.grpc import service_pb2 as oip_pb2

from lingqu.inference.v1 import inference_pb2

TEXT_SERVICE = "lingqu.inference.v1.InferenceService"
TENSOR_SERVICE = "inference.GRPCInferenceService"

HEALTH_PREFIX = "/grpc.health.v1.Health/"
# Open to everybody: they tell nothing but what the published protos tell.
OPEN_PREFIXES = (
    HEALTH_PREFIX,
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
)

TEXT_METHODS = ("Generate", "StreamGenerate", "Embed", "Classify", "Answer", "Score", "Tokenize")
# The protocol's other methods change the server or its memory: they are not for clients.
TENSOR_INFERENCE = ("ModelInfer", "ModelStreamInfer")
TENSOR_DESCRIPTION = ("ModelMetadata", "ModelReady", "ModelConfig", "ModelStatistics")
TENSOR_SERVER = ("ServerLive", "ServerReady", "ServerMetadata")

# By service and method, the fields that name the model, and its version where there is one.
NAMING: dict[str, dict[str, tuple[str, ...]]] = {
    TEXT_SERVICE: dict.fromkeys(TEXT_METHODS, ("model",)),
    TENSOR_SERVICE: {
        **dict.fromkeys(TENSOR_INFERENCE, ("model_name", "model_version")),
        **dict.fromkeys(TENSOR_DESCRIPTION, ("name", "version")),
    },
}


def extractions() -> dict[str, Any]:
    """grpc_field_extraction's extractions_by_method."""
    return {
        f"{service}.{method}": {"request_field_extractions": {field: {} for field in fields}}
        for service, methods in NAMING.items()
        for method, fields in methods.items()
    }


@cache
def descriptor_set() -> str:
    """base64 of the FileDescriptorSet of both services with all they import."""
    files: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        if file.name not in files:
            for dependency in file.dependencies:
                add(dependency)
            files[file.name] = file

    add(inference_pb2.DESCRIPTOR)
    add(oip_pb2.DESCRIPTOR)
    # What errors are made of.
    add(status_pb2.DESCRIPTOR)
    add(error_details_pb2.DESCRIPTOR)
    found = FileDescriptorSet()
    for file in files.values():
        file.CopyToProto(found.file.add())
    return base64.b64encode(found.SerializeToString()).decode()
