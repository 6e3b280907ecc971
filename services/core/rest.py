"""What both sides of REST agree on, inference which answers and the gateway which answers some by itself: how
large a body may be, and errors as REST clients see them, an HTTP status and OpenAI's error object.

{"error": {"message": "…", "type": "…", "param": "field" | null, "code": "…" | null}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from services.core.errors import InvalidInput, LingquError

MAX_BODY_BYTES = 8 << 20

# By status code: HTTP status, type, and the code where the reason has none of its own.
_BY_CODE: Mapping[grpc.StatusCode, tuple[int, str, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error", "invalid_value"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error", "permission_denied"),
    grpc.StatusCode.NOT_FOUND: (404, "invalid_request_error", "not_found"),
    grpc.StatusCode.FAILED_PRECONDITION: (409, "invalid_request_error", "not_ready"),
    grpc.StatusCode.ALREADY_EXISTS: (409, "invalid_request_error", "already_exists"),
    grpc.StatusCode.ABORTED: (409, "api_error", "conflict"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    grpc.StatusCode.UNIMPLEMENTED: (501, "invalid_request_error", "not_implemented"),
    grpc.StatusCode.UNAVAILABLE: (503, "api_error", "backend_unavailable"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error", "deadline_exceeded"),
}
_UNKNOWN = (500, "api_error", "internal_error")
# Reasons that say more than their status code.
_BY_REASON: Mapping[str, tuple[int, str, str]] = {
    "MODEL_NOT_FOUND": (404, "invalid_request_error", "model_not_found"),
    "VERSION_NOT_SERVED": (404, "invalid_request_error", "version_not_served"),
    "MESSAGE_TOO_LARGE": (413, "invalid_request_error", "request_too_large"),
    "METHOD_NOT_ALLOWED": (405, "invalid_request_error", "method_not_allowed"),
    "KEY_REVOKED": (401, "authentication_error", "key_revoked"),
    "CLIENT_DISABLED": (401, "authentication_error", "client_disabled"),
    "MODEL_NOT_ALLOWED": (403, "permission_error", "model_not_allowed"),
    "UNKNOWN_CLIENT": (403, "permission_error", "unknown_client"),
    "WRONG_TASK": (400, "invalid_request_error", "wrong_task"),
    "UNSUPPORTED": (400, "invalid_request_error", "unsupported_parameter"),
    "UNKNOWN_PARAMETER": (400, "invalid_request_error", "unknown_parameter"),
}


@dataclass(frozen=True, slots=True)
class HttpError:
    """`retry_after_s` are whole seconds, as the header Retry-After wants them; None where waiting does not
    help."""

    status: int
    body: dict[str, Any]
    retry_after_s: int | None = None


class MethodNotAllowed(LingquError):
    """The path exists, for another method of HTTP."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "METHOD_NOT_ALLOWED"


class UnknownParameter(InvalidInput):
    """A parameter that no version of the API knows: most likely misspelt."""

    reason = "UNKNOWN_PARAMETER"

    def __init__(self, field: str) -> None:
        super().__init__(field, f"Unrecognized request argument supplied: {field}")

    def __str__(self) -> str:
        return self.description


def to_http(error: LingquError) -> HttpError:
    status, kind, code = _BY_REASON.get(error.reason) or _BY_CODE.get(error.code, _UNKNOWN)
    param = error.field if isinstance(error, InvalidInput) else None
    body = {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
    wait = error.retry_after_s
    return HttpError(status, body, None if wait is None else max(1, math.ceil(wait)))
