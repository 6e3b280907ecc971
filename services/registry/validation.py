"""What the registry accepts: names become etcd keys, Envoy clusters and Triton models, so they are strict."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable, Mapping

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from lingqu.registry.v1 import access_pb2, instances_pb2, models_pb2, rollouts_pb2
from services.core.errors import InvalidInput

TASKS = ("generate", "embed", "classify", "answer", "tensor")
RUNTIMES = ("openvino-genai", "onnxruntime", "openvino", "tensorrt", "tensorrt-llm", "python")
MAX_LABELS = 32
MAX_MODELS = 1024
MAX_URI = 2048
MAX_DETAIL = 1024
MAX_FIGURES = 64
MAX_PATTERNS = 100
MAX_WEIGHTS = 30
MAX_TENSORS, MAX_DIMENSIONS = 256, 32
# etcd takes 1.5 MiB a transaction, and every watcher is sent every version.
MAX_VERSION_BYTES = 64 << 10
MAX_WAIT_S = 7 * 86_400
TTL_DEFAULT_S = 10
TTL_RANGE_S = (1, 600)

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INSTANCE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LEDGER_NAME = re.compile(r"[a-zA-Z0-9/]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{0,64}")
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}")
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PATTERN = re.compile(r"[A-Za-z0-9._@*-]{1,64}")
_DATATYPE = re.compile(r"[A-Z][A-Z0-9]{1,15}")
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
        if not 0 <= hosted.progress <= 1:
            raise InvalidInput(f"instance.models[{index}].progress", "is a share, 0 to 1")
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
    if len(value.artifact.signature) not in (0, 64):
        raise InvalidInput("version.artifact.signature", "64 bytes of Ed25519, or nothing, are needed")
    _text("version.artifact.signer", value.artifact.signer, 64)
    if value.artifact.size_bytes < 0:
        raise InvalidInput("version.artifact.size_bytes", "is negative")
    try:
        SpecifierSet(_text("version.requirements.engine", value.requirements.engine, 256))
    except InvalidSpecifier as err:
        raise InvalidInput(
            "version.requirements.engine", "a specifier like >=2026.4,<2027 is needed"
        ) from err
    _text("version.requirements.fingerprint", value.requirements.fingerprint, 256)
    for kind, tensors in (("inputs", value.signature.inputs), ("outputs", value.signature.outputs)):
        _tensors(f"version.signature.{kind}", tensors)
    figures("version.evaluation", value.evaluation)
    for name in ("parent", "training_run", "source"):
        _text(f"version.lineage.{name}", getattr(value.lineage, name), 256)
    if value.lineage.data_sha256 and not _SHA256.fullmatch(value.lineage.data_sha256):
        raise InvalidInput("version.lineage.data_sha256", "64 lower-case hexadecimal digits are needed")
    if value.ByteSize() > MAX_VERSION_BYTES:
        raise InvalidInput("version", f"at most {MAX_VERSION_BYTES} bytes in all")
    return value


def _tensors(field: str, tensors: Iterable[models_pb2.TensorSignature]) -> None:
    for index, tensor in enumerate(tensors):
        if index >= MAX_TENSORS:
            raise InvalidInput(field, f"at most {MAX_TENSORS} tensors")
        if not 0 < len(tensor.name) <= 128:
            raise InvalidInput(f"{field}[{index}].name", "1 to 128 characters are needed")
        if not _DATATYPE.fullmatch(tensor.datatype):
            raise InvalidInput(f"{field}[{index}].datatype", "one like FP32, INT64 or BYTES is needed")
        if len(tensor.shape) > MAX_DIMENSIONS or any(size < -1 for size in tensor.shape):
            raise InvalidInput(
                f"{field}[{index}].shape", f"at most {MAX_DIMENSIONS} dimensions, -1 where variable"
            )


def figures(field: str, values: Mapping[str, float]) -> dict[str, float]:
    """Figures by name. NaN is let through where it was measured: no threshold and no guard accepts it."""
    if len(values) > MAX_FIGURES:
        raise InvalidInput(field, f"at most {MAX_FIGURES} figures")
    for name in values:
        if not 0 < len(name) <= 63:
            raise InvalidInput(f"{field}[{name[:63]}]", "names have 1 to 63 characters")
    return dict(values)


def weights(request: models_pb2.SetTrafficRequest) -> dict[int, int]:
    """Percent by version."""
    if request.shadow_percent > 100:
        raise InvalidInput("shadow_percent", "1 to 100 is needed, or 0 for all")
    if request.shadow_percent and not request.shadow_version:
        raise InvalidInput("shadow_percent", "goes with a shadow_version only")
    if request.offline:
        if request.version or request.weights or request.shadow_version:
            raise InvalidInput("offline", "goes with no version, weights or shadow_version")
        return {}
    if request.version and request.weights:
        raise InvalidInput("weights", "give either version or weights")
    if not request.weights and not request.version:
        raise InvalidInput("weights", "are required: shares that add up to 100 (or version, or offline)")
    if len(request.weights) > MAX_WEIGHTS:
        raise InvalidInput("weights", f"at most {MAX_WEIGHTS}")
    found: dict[int, int] = {request.version: 100} if request.version else {}
    for index, weight in enumerate(request.weights):
        if weight.version in found:
            raise InvalidInput(f"weights[{index}].version", f"version {weight.version} is there twice")
        if not 1 <= weight.percent <= 100:
            raise InvalidInput(f"weights[{index}].percent", "1 to 100 is needed")
        found[weight.version] = weight.percent
    if (total := sum(found.values())) != 100:
        raise InvalidInput("weights", f"they add up to {total}, not to 100")
    if request.shadow_version in found:
        raise InvalidInput("shadow_version", "a version cannot shadow itself")
    return found


def policy(value: models_pb2.Policy) -> models_pb2.Policy:
    if value.min_ready_replicas > 1000:
        raise InvalidInput("policy.min_ready_replicas", "at most 1,000")
    seconds("policy.min_release_interval", value.min_release_interval, 366 * 86_400)
    if len(value.thresholds) > MAX_FIGURES:
        raise InvalidInput("policy.thresholds", f"at most {MAX_FIGURES}")
    for index, threshold in enumerate(value.thresholds):
        bounds(f"policy.thresholds[{index}]", threshold)
    patterns("policy.releasers", value.releasers)
    if value.protection.breaker_error_percent > 100:
        raise InvalidInput("policy.protection.breaker_error_percent", "at most 100")
    if value.protection.fallback_model:
        model_name("policy.protection.fallback_model", value.protection.fallback_model)
    latency = value.protection.breaker_latency
    if value.protection.HasField("breaker_latency") and not 0 < latency.ToNanoseconds() <= 3600 * 10**9:
        raise InvalidInput("policy.protection.breaker_latency", "more than nothing, at most an hour")
    return value


def placement(value: models_pb2.Placement) -> models_pb2.Placement:
    _labels("placement.labels", value.labels)
    if len(value.keep) > 100:
        raise InvalidInput("placement.keep", "at most 100 versions")
    return value


def bounds(field: str, value: models_pb2.Threshold | rollouts_pb2.Guard) -> None:
    if not 0 < len(value.metric) <= 63:
        raise InvalidInput(f"{field}.metric", "1 to 63 characters are needed")
    if not value.HasField("min") and not value.HasField("max"):
        raise InvalidInput(f"{field}.min", "min, max or both are needed")
    for name in ("min", "max"):
        if math.isnan(getattr(value, name)):
            raise InvalidInput(f"{field}.{name}", "a number is needed")
    if value.HasField("min") and value.HasField("max") and value.min > value.max:
        raise InvalidInput(f"{field}.min", "is above max: nothing could satisfy it")


def client(value: access_pb2.Client) -> access_pb2.Client:
    client_name("client.name", value.name)
    patterns("client.models", value.models)
    _limits("client", value)
    _labels("client.labels", value.labels)
    if value.tier:
        client_name("client.tier", value.tier)
    return value


def tier(value: access_pb2.Tier) -> access_pb2.Tier:
    client_name("tier.name", value.name)
    _limits("tier", value)
    return value


def _limits(field: str, value: access_pb2.Client | access_pb2.Tier) -> None:
    if len(value.model_limits) > MAX_PATTERNS:
        raise InvalidInput(f"{field}.model_limits", f"at most {MAX_PATTERNS}")
    for index, limit in enumerate(value.model_limits):
        _pattern(f"{field}.model_limits[{index}].models", limit.models)
        _scope(f"{field}.model_limits[{index}].limits", limit.limits)
    _scope(f"{field}.limits", value.limits)


def shared_limits(value: access_pb2.SharedLimits) -> access_pb2.SharedLimits:
    model_name("shared_limits.model", value.model)
    _scope("shared_limits.limits", value.limits)
    return value


def _scope(field: str, limits: access_pb2.Limits) -> None:
    for name in ("scope", "requests_per_second_scope", "requests_per_minute_scope"):
        if getattr(limits, name) not in access_pb2.Limits.Scope.values():
            raise InvalidInput(f"{field}.{name}", "is not known")


def client_name(field: str, value: str) -> str:
    if not _CLIENT.fullmatch(value):
        raise InvalidInput(
            field,
            "1 to 64 letters, digits, '.', '_', '@' and '-', starting with a letter or digit, are needed",
        )
    return value


def key_id(value: str) -> str:
    if not _KEY_ID.fullmatch(value):
        raise InvalidInput("key_id", "1 to 64 letters, digits, '_' and '-' are needed; not the key itself")
    return value


def issued_key(value: access_pb2.IssuedKey) -> access_pb2.IssuedKey:
    key_id(value.key_id)
    client_name("key.client", value.client)
    if value.created_by:
        client_name("key.created_by", value.created_by)
    patterns("key.models", value.models)
    _text("key.signing_key_id", value.signing_key_id, 64)
    for field in ("create_time", "expire_time"):
        timestamp(f"key.{field}", getattr(value, field))
    return value


def alias(value: str) -> str:
    if not _ALIAS.fullmatch(value):
        raise InvalidInput(
            "alias", "1 to 32 lower-case letters, digits and '-', starting with a letter, are needed"
        )
    return value


def reason(value: str, field: str = "reason") -> str:
    return _text(field, value, MAX_DETAIL)


def patterns(field: str, values: Iterable[str]) -> None:
    for index, value in enumerate(values):
        if index >= MAX_PATTERNS:
            raise InvalidInput(field, f"at most {MAX_PATTERNS}")
        _pattern(f"{field}[{index}]", value)


def _pattern(field: str, value: str) -> None:
    if not _PATTERN.fullmatch(value):
        raise InvalidInput(field, "a name in which '*' may stand for any text is needed")


def within(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidInput(field, f"{low} to {high} is needed")
    return value


def _text(field: str, value: str, most: int) -> str:
    if len(value) > most:
        raise InvalidInput(field, f"at most {most} characters")
    return value


def seconds(field: str, value: Duration, most: int) -> None:
    if value.nanos or not 0 <= value.seconds <= most:
        raise InvalidInput(field, f"whole seconds, 0 to {most}, are needed")


def request_id(value: str) -> str:
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidInput("request_id", "at most 64 letters, digits, '.', '_' and '-'")
    return value


def endpoint(field: str, value: str) -> str:
    if not _is_endpoint(value):
        raise InvalidInput(field, "an address and a port, like 10.0.0.7:8081, are needed")
    return value


def ledger_name(value: str) -> str:
    if not _LEDGER_NAME.fullmatch(value):
        raise InvalidInput("entries.name", "1 to 64 letters, digits and '/' are needed")
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


def timestamp(field: str, value: Timestamp) -> Timestamp:
    """From year 1 to 9999, as protobuf has it; others cannot be told as text."""
    try:
        value.ToNanoseconds()
    except ValueError as err:
        raise InvalidInput(
            field, "a time from year 1 to 9999, nanos from 0 to 999,999,999, is needed"
        ) from err
    return value
