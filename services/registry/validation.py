"""What the registry accepts: names become etcd keys, Envoy clusters and Triton models, so they are strict."""

from __future__ import annotations

import ipaddress
import re

from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import instances_pb2, models_pb2
from services.core.errors import InvalidInput

TASKS = ("generate", "embed", "tensor")
RUNTIMES = ("openvino-genai", "onnxruntime", "python")
MAX_LABELS = 32
MAX_MODELS = 1024
MAX_URI = 2048
MAX_DETAIL = 1024
TTL_DEFAULT_S = 10
TTL_RANGE_S = (1, 600)

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INSTANCE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{0,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_name(field: str, value: str) -> str:
    if not _MODEL_NAME.fullmatch(value):
        raise InvalidInput(
            field, "1 to 64 letters, digits, '.', '_' and '-', starting with a letter or digit, are needed"
        )
    return value


def instance_id(field: str, value: str) -> str:
    if not _INSTANCE_ID.fullmatch(value):
        raise InvalidInput(field, "1 to 128 letters, digits, '.', '_' and '-' are needed")
    return value


def instance(value: instances_pb2.Instance) -> instances_pb2.Instance:
    instance_id("instance.id", value.id)
    instance_id("instance.service", value.service)
    for protocol, address in value.endpoints.items():
        if not _is_endpoint(address):
            raise InvalidInput(
                f"instance.endpoints[{protocol}]", "an IP address others can reach, and a port"
            )
    _labels("instance.labels", value.labels)
    if len(value.models) > MAX_MODELS:
        raise InvalidInput("instance.models", f"at most {MAX_MODELS}")
    for index, hosted in enumerate(value.models):
        model_name(f"instance.models[{index}].model", hosted.model)
        if hosted.version < 1:
            raise InvalidInput(f"instance.models[{index}].version", "versions are numbered from 1")
        if len(hosted.detail) > MAX_DETAIL:
            raise InvalidInput(f"instance.models[{index}].detail", f"at most {MAX_DETAIL} characters")
    return value


def ttl_s(value: Duration | None) -> int:
    if value is None:
        return TTL_DEFAULT_S
    seconds = value.seconds + (1 if value.nanos else 0)  # etcd counts whole seconds
    low, high = TTL_RANGE_S
    if not low <= seconds <= high:
        raise InvalidInput("ttl", f"{low} s to {high} s")
    return seconds


def version(value: models_pb2.ModelVersion) -> models_pb2.ModelVersion:
    model_name("version.model", value.model)
    if "://" not in value.artifact.uri or len(value.artifact.uri) > MAX_URI:
        raise InvalidInput(
            "version.artifact.uri",
            f"a URI such as file:///… or s3://…, at most {MAX_URI} characters, is needed",
        )
    if not _SHA256.fullmatch(value.artifact.sha256):
        raise InvalidInput("version.artifact.sha256", "64 lower-case hexadecimal digits are needed")
    if value.task not in TASKS:
        raise InvalidInput("version.task", f"one of {', '.join(TASKS)} is needed")
    if value.runtime not in RUNTIMES:
        raise InvalidInput("version.runtime", f"one of {', '.join(RUNTIMES)} is needed")
    _labels("version.labels", value.labels)
    return value


def request_id(value: str) -> str:
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidInput("request_id", "at most 64 letters, digits, '.', '_' and '-'")
    return value


def _is_endpoint(value: str) -> bool:
    """Envoy's endpoints are addresses, not names."""
    host, _, port = value.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return not address.is_unspecified and port.isdigit() and 0 < int(port) < 65536


def _labels(field: str, labels: object) -> None:
    pairs = dict(labels)  # type: ignore[call-overload]
    if len(pairs) > MAX_LABELS:
        raise InvalidInput(field, f"at most {MAX_LABELS} labels")
    for key, value in pairs.items():
        if not 0 < len(key) <= 63 or len(value) > 256:
            raise InvalidInput(f"{field}[{key[:63]}]", "keys of 1 to 63 and values of at most 256 characters")
