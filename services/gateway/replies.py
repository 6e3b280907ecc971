"""Answers that Envoy gives by itself, in the form clients expect: status, message and details for gRPC,
OpenAI's error object for REST."""

from __future__ import annotations

import base64
from typing import Any

from services.core.errors import LingquError, to_rpc_status
from services.core.rest import to_http


def details_header(error: LingquError) -> str:
    """The value of grpc-status-details-bin: base64 of google.rpc.Status, without padding."""
    return base64.b64encode(to_rpc_status(error).SerializeToString()).rstrip(b"=").decode()


def headers(error: LingquError) -> list[dict[str, Any]]:
    """Response headers that make a local reply the gRPC answer `error`. Message and details agree: grpcio
    takes them for broken otherwise."""
    fields = {
        "grpc-status": str(error.code.value[0]),
        "grpc-message": str(error).replace("%", "%%"),  # to Envoy a % begins a variable
        "grpc-status-details-bin": details_header(error),
    }
    return [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in fields.items()
    ]


def local_reply(error: LingquError) -> dict[str, Any]:
    """The rewriting part of a local_reply_config mapper: Envoy makes the body the grpc-message."""
    return {"headers_to_add": headers(error), "body": {"inline_string": str(error)}}


def rest_reply(error: LingquError) -> dict[str, Any]:
    """The rewriting part of a mapper for REST."""
    made = to_http(error)
    # To Envoy a % begins a variable.
    reply: dict[str, Any] = {
        "status_code": made.status,
        "body_format_override": {"json_format": _escaped(made.body)},
    }
    if made.retry_after_s is not None:
        header = {"key": "retry-after", "value": str(made.retry_after_s)}
        reply["headers_to_add"] = [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]
    return reply


def reply_from(header: str) -> dict[str, Any]:
    """For gRPC: the message is in a header of the answer, which has all the rest already."""
    return {"body_format_override": {"text_format_source": {"inline_string": f"%RESP({header})%"}}}


def rest_reply_from(header: str, error: LingquError) -> dict[str, Any]:
    """The same for REST, with the status and the kind of `error`."""
    made = to_http(error)
    body = {"error": {**made.body["error"], "message": f"%RESP({header})%"}}
    return {"status_code": made.status, "body_format_override": {"json_format": body}}


def any_rest_reply() -> dict[str, Any]:
    """The same for what nobody thought of, with Envoy's own words and status."""
    error = {"message": "%LOCAL_REPLY_BODY%", "type": "api_error", "param": None, "code": None}
    return {"body_format_override": {"json_format": {"error": error}}}


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return value.replace("%", "%%") if isinstance(value, str) else value
