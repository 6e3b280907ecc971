"""Our own API in the OpenAPI document: made from the protos and their google.api.http annotations, which the
gateway serves it by (https://protobuf.dev/programming-guides/json)."""

from __future__ import annotations

from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from lingqu.inference.v1 import inference_pb2

REF = "#/components/schemas/"
STATUS = "google.rpc.Status"
_INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
# In JSON a number of 64 bits is text; numbers are taken, too.
_UINT64 = {
    "oneOf": [
        {"type": "string", "pattern": "^[0-9]{1,19}$"},
        {"type": "integer", "minimum": 0, "maximum": 2**53 - 1},
    ]
}
_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_UINT64: _UINT64,
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "minimum": -3.4e38, "maximum": 3.4e38},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}


def paths() -> dict[str, Any]:
    methods = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
    return dict(_path(method) for method in methods)


def schemas() -> dict[str, Any]:
    """Of every message that a path names, directly or not, and of errors."""
    found: dict[str, Any] = {STATUS: _STATUS}
    waiting = [
        message
        for method in inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
        for message in (method.input_type, method.output_type)
    ]
    while waiting:
        message = waiting.pop()
        if message.full_name not in found:
            found[message.full_name] = _message(message)
            waiting += [field.message_type for field in message.fields if field.message_type is not None]
    return found


def _path(method: MethodDescriptor) -> tuple[str, dict[str, Any]]:
    path = method.GetOptions().Extensions[annotations_pb2.http].post
    kind = "text/event-stream" if method.server_streaming else "application/json"
    answer = {"type": "string"} if method.server_streaming else _ref(method.output_type)
    summary = f"{method.name} of {method.containing_service.full_name}" + (
        f"; each event is a {method.output_type.name} as JSON" if method.server_streaming else ""
    )
    operation = {
        "operationId": method.name[0].lower() + method.name[1:],
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(method.input_type))},
        "responses": {
            "200": {"description": "The answer", "content": {kind: {"schema": answer}}},
            "default": {"description": "google.rpc.Status", "content": _json({"$ref": REF + STATUS})},
        },
    }
    # A model's name has no characters that would have to be escaped.
    name = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
    model = {"name": "model", "in": "path", "required": True, "schema": name}
    return path, {"parameters": [model], "post": operation}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(message: Descriptor) -> dict[str, Any]:
    return {"$ref": REF + message.full_name}


def _message(message: Descriptor) -> dict[str, Any]:
    # The path names the model.
    in_path = message.name.endswith("Request")
    properties = {f.name: _field(f) for f in message.fields if not (in_path and f.name == "model")}
    return {"type": "object", "properties": properties, "additionalProperties": not in_path}


def _field(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type is not None:
        one = _ref(field.message_type)
    elif field.enum_type is not None:
        one = {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    else:
        one = _SCALARS[field.type]
    return {"type": "array", "items": one} if field.is_repeated else one


_DETAIL = {"type": "object", "required": ["@type"], "properties": {"@type": {"type": "string"}}}
_STATUS = {
    "type": "object",
    "required": ["code", "message", "details"],
    "properties": {
        "code": {"type": "integer"},
        "message": {"type": "string"},
        "details": {"type": "array", "items": _DETAIL},
    },
}
