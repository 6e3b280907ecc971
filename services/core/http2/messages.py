"""Length-prefixed messages, time-outs and metadata, as gRPC puts them into HTTP/2."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import quote_from_bytes

import grpc

Metadatum: TypeAlias = "tuple[str, str | bytes]"
Fields: TypeAlias = "list[tuple[str, str]]"

PREFIX = 5  # bytes before a message: whether it is compressed, and its length
ENCODINGS = "identity,gzip,deflate"

_WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
# What HTTP/2 and gRPC themselves need, and no handler is told.
_NO_METADATA = {
    "te",
    "content-type",
    "content-length",
    "grpc-timeout",
    "grpc-encoding",
    "grpc-accept-encoding",
}
# In a grpc-message all but these are %-encoded: printable ASCII without "%".
_UNQUOTED = bytes(b for b in range(0x20, 0x7F) if b != ord("%")).decode()


class Refused(Exception):
    """What came is not what gRPC allows, or too much of it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


def prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


class Reader:
    """Puts the messages of one stream together again, of at most `most` bytes each."""

    def __init__(self, encoding: str, most: int) -> None:
        self._encoding = encoding
        self._most = most
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes of the message that is not whole yet."""
        return len(self._buffer)

    def push(self, data: bytes) -> list[bytes]:
        """The messages that are whole now. Raises Refused."""
        self._buffer += data
        whole = []
        while len(self._buffer) >= PREFIX:
            compressed, size = self._buffer[0], int.from_bytes(self._buffer[1:PREFIX], "big")
            if compressed > 1:
                raise Refused(grpc.StatusCode.INTERNAL, f"a message begins with {compressed}, not 0 or 1")
            if size > self._most:
                raise self._too_large(size)
            if len(self._buffer) < PREFIX + size:
                break
            message = bytes(memoryview(self._buffer)[PREFIX : PREFIX + size])
            del self._buffer[: PREFIX + size]
            whole.append(self._inflated(message) if compressed else message)
        return whole

    def _inflated(self, message: bytes) -> bytes:
        bits = _WINDOW_BITS.get(self._encoding)
        if bits is None:
            raise Refused(grpc.StatusCode.INTERNAL, "a message is compressed, but no grpc-encoding says how")
        inflater = zlib.decompressobj(bits)
        try:
            data = inflater.decompress(message, self._most + 1)
        except zlib.error as err:
            raise Refused(grpc.StatusCode.INTERNAL, f"a message is no {self._encoding}: {err}") from err
        if len(data) > self._most:
            raise self._too_large(len(data))
        if not inflater.eof:
            raise Refused(grpc.StatusCode.INTERNAL, f"a message is no whole {self._encoding}")
        return data

    def _too_large(self, size: int) -> Refused:
        return Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"a message of {size} bytes or more, but at most {self._most} are read",
        )


def check_encoding(encoding: str) -> None:
    """Raises Refused."""
    if encoding not in ENCODINGS.split(","):
        raise Refused(grpc.StatusCode.UNIMPLEMENTED, f"grpc-encoding is none of {ENCODINGS}")


def timeout(value: str) -> float:
    """Seconds of a grpc-timeout. Raises Refused."""
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise Refused(grpc.StatusCode.INTERNAL, "grpc-timeout is not 1 to 8 digits and a unit")
    return int(found[1]) * _SECONDS[found[2]]


def metadata(fields: Iterable[tuple[str, str]]) -> tuple[Metadatum, ...]:
    """What a handler is told of a request's headers. Raises Refused."""
    told: list[Metadatum] = []
    for name, value in fields:
        if name.startswith(":") or name in _NO_METADATA:
            continue
        if name.endswith("-bin"):
            told.extend((name, _binary(name, each)) for each in value.split(","))
        else:
            told.append((name, value))
    return tuple(told)


def _binary(name: str, value: str) -> bytes:
    value = value.strip()
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except binascii.Error as err:
        raise Refused(grpc.StatusCode.INTERNAL, f"{name} is not Base64") from err


def fields(told: Iterable[tuple[str, str | bytes]]) -> Fields:
    """Metadata as headers."""
    return [(name.lower(), _text(value)) for name, value in told]


def _text(value: str | bytes) -> str:
    return base64.b64encode(value).rstrip(b"=").decode() if isinstance(value, bytes) else value


def message_field(details: str) -> str:
    return quote_from_bytes(details.encode("utf-8", "replace"), safe=_UNQUOTED)
