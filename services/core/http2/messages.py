"""Length-prefixed messages, as gRPC puts them into HTTP/2."""

from __future__ import annotations

import zlib

import grpc

PREFIX = 5  # bytes before a message: whether it is compressed, and its length
ENCODINGS = "identity,gzip,deflate"

_WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


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
        if not self._buffer and data[:1] == b"\0":  # nearly always: one message, and all of it
            size = len(data) - PREFIX
            if 0 <= size <= self._most and size == int.from_bytes(data[1:PREFIX], "big"):
                return [data[PREFIX:]]
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
