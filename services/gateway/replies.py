"""Answers that Envoy gives by itself, in the form clients expect: status, message and details for gRPC,
OpenAI's error object for OpenAI's REST API, google.rpc.Status as JSON for our own."""

from __future__ import annotations

import base64
from typing import Any

from google.protobuf.json_format import MessageToDict

from services.core.errors import InvalidInput, LingquError, to_rpc_status
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
    return _json_reply(error, _escaped(to_http(error).body))


def own_rest_reply(error: LingquError) -> dict[str, Any]:
    """The rewriting part of a mapper for our own API, alike to what Envoy makes of backends' errors."""
    return _json_reply(error, _escaped(_status(error)))


def own_rest_reply_from(header: str, error: LingquError) -> dict[str, Any]:
    """As rest_reply_from."""
    body = {**_status(error), "message": f"%RESP({header})%"}
    return {"status_code": to_http(error).status, "body_format_override": {"json_format": body}}


def any_own_rest_reply() -> dict[str, Any]:
    """As any_rest_reply; UNKNOWN, since Envoy's statuses are those of HTTP."""
    status = {"code": 2, "message": "%LOCAL_REPLY_BODY%", "details": []}
    return {"body_format_override": {"json_format": status}}


def malformed_reply() -> dict[str, Any]:
    """The same for what is no request of our own API, with Envoy's words."""
    error = InvalidInput("request", "%LOCAL_REPLY_BODY%")
    return _json_reply(error, _status(error))


def _status(error: LingquError) -> dict[str, Any]:
    return MessageToDict(to_rpc_status(error), preserving_proto_field_name=True)


def _json_reply(error: LingquError, body: dict[str, Any]) -> dict[str, Any]:
    made = to_http(error)
    reply: dict[str, Any] = {"status_code": made.status, "body_format_override": {"json_format": body}}
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
    """To Envoy a % begins a variable."""
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return value.replace("%", "%%") if isinstance(value, str) else value
