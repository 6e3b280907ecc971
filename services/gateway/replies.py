"""Answers that Envoy gives by itself, in the form gRPC clients expect: status, message, details."""

from __future__ import annotations

import base64
from typing import Any

from services.core.errors import LingquError, to_rpc_status


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
