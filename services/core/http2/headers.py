"""Headers: what a request says in them, and blocks of them for a response.

A block is HPACK (RFC 7541) without its table and without Huffman's code: they would save a few bytes of a
response, and take half of its time. A client's headers are looked at here and not by h2, for which a bad one
is the end of the connection, and of all calls that a proxy has in it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from urllib.parse import quote_from_bytes

import grpc

from services.core.http2.messages import ENCODINGS, Refused

# What handlers give, as for grpcio.
Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"

MAX_HEADERS = 64 << 10  # bytes, as HTTP/2 counts them
FIELD = 32  # bytes that HTTP/2 counts for a field besides its name and value

# Until the first block a client has to expect that we use its table (RFC 7541, 4.2).
NO_TABLE = b"\x20"
_STATUS_200 = b"\x88"
_STATUS_415 = b"\x08\x03415"
_CONTENT_TYPE = b"\x0f\x10\x10application/grpc"
BEGIN = _STATUS_200 + _CONTENT_TYPE
NO_GRPC = _STATUS_415

_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
# What HTTP/2 and gRPC themselves need, and no handler is told.
_NO_METADATA = {
    b"te",
    b"content-type",
    b"content-length",
    b"grpc-timeout",
    b"grpc-encoding",
    b"grpc-accept-encoding",
}
_NAME = re.compile(rb"[0-9a-z_.!#$%&'*+^`|~-]+")
_NOT_IN_VALUES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_OUR_NAME = re.compile(r"[0-9a-z_.-]+")
_OUR_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
# In a grpc-message all but these are %-encoded: printable ASCII without "%".
_UNQUOTED = bytes(b for b in range(0x20, 0x7F) if b != ord("%")).decode()


class Metadatum(NamedTuple):
    key: str
    value: str | bytes


@dataclass(frozen=True, slots=True)
class Request:
    """`is_grpc`: whether it is a call at all. `timeout_s`: None if it has no deadline."""

    is_grpc: bool
    path: str
    encoding: str
    timeout_s: float | None
    metadata: tuple[Metadatum, ...]


def request(headers: Iterable[tuple[bytes, bytes]]) -> Request:
    """What a request's headers say. Raises Refused."""
    own: dict[bytes, bytes] = {}
    told: list[Metadatum] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + FIELD
        if name.startswith(b":") or name in _NO_METADATA:
            own[name] = value
            continue
        if not _NAME.fullmatch(name) or _NOT_IN_VALUES.search(value):
            raise Refused(grpc.StatusCode.INTERNAL, "a header has characters that headers may not have")
        key = name.decode()
        if name.endswith(b"-bin"):
            told.extend(Metadatum(key, _binary(key, each)) for each in value.split(b","))
        else:
            told.append(Metadatum(key, _text(value)))
    if size > MAX_HEADERS:
        raise Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"headers of {size} bytes, but at most {MAX_HEADERS}"
        )
    kind = own.get(b"content-type", b"")
    return Request(
        own.get(b":method") == b"POST"
        and kind[:16] == b"application/grpc"
        and kind[16:17] in (b"", b"+", b";"),
        own.get(b":path", b"").decode("latin-1"),
        own.get(b"grpc-encoding", b"identity").decode("latin-1"),
        _timeout_s(own[b"grpc-timeout"]) if b"grpc-timeout" in own else None,
        tuple(told),
    )


def _timeout_s(value: bytes) -> float:
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise Refused(grpc.StatusCode.INTERNAL, "grpc-timeout is not 1 to 8 digits and a unit")
    return int(found[1]) * _SECONDS[found[2].decode()]


def _text(value: bytes) -> str:
    try:
        return value.decode().strip(" \t")
    except UnicodeDecodeError:  # what other than ASCII means nobody says
        return value.decode("latin-1").strip(" \t")


def _binary(name: str, value: bytes) -> bytes:
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as err:
        raise Refused(grpc.StatusCode.INTERNAL, f"{name} is not Base64") from err


def encoded(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """A block of it. Raises ValueError if gRPC does not allow a name or a value."""
    block = bytearray()
    for name, value in metadata:
        name = name.lower()
        if not _OUR_NAME.fullmatch(name):
            raise ValueError(f"metadata may not have the name {name!r}")
        if name.endswith("-bin"):
            value = (
                base64.b64encode(value.encode() if isinstance(value, str) else value).rstrip(b"=").decode()
            )
        elif isinstance(value, bytes):
            value = value.decode("ascii")
        if not _OUR_VALUE.fullmatch(value):
            raise ValueError(f"metadata {name} may not have that value")
        block += _field(name.encode(), value.encode())
    return bytes(block)


def status(code: int, details: str) -> bytes:
    """A block of the status that ends a call."""
    if not details:
        return _STATUSES[code] if 0 <= code < len(_STATUSES) else _field(b"grpc-status", b"%d" % code)
    message = quote_from_bytes(details.encode("utf-8", "replace"), safe=_UNQUOTED)
    # A value may not begin or end with a space.
    inner = message.strip(" ")
    start = len(message) - len(message.lstrip(" "))
    message = "%20" * start + inner + "%20" * (len(message) - start - len(inner))
    return status(code, "") + _field(b"grpc-message", message.encode())


def _field(name: bytes, value: bytes) -> bytes:
    """Literal, without indexing (RFC 7541, 6.2.2)."""
    return b"\0" + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    """RFC 7541, 5.1, with a prefix of seven bits."""
    if size < 127:
        return bytes((size,))
    out, size = bytearray((127,)), size - 127
    while size >= 128:
        out.append(size % 128 + 128)
        size //= 128
    return bytes((*out, size))


# Of a refusal, for those whose encoding it was.
ACCEPTED = _field(b"grpc-accept-encoding", ENCODINGS.encode())
_STATUSES = [_field(b"grpc-status", b"%d" % code) for code in range(17)]
