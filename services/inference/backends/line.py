"""The short way of a session's tokens: a local socket from the engine's process to inference, past Triton.

A message of Triton's costs the engine a change of threads and back, and Triton and gRPC more than the tokens
are worth; a packet on a socket is written between two steps by the engine's own thread. Inference listens,
its `open` command (wire.py) says where, and who connects proves with the session's secret to be the engine's
process. The name is in Linux's abstract space: no file, and containers of a pod share it. Where it cannot be
reached, tokens take the way through Triton. Packets are rows of wire.py, or a byte: the engine works.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import select
import socket
import threading
import uuid
from collections.abc import Callable

log = logging.getLogger(__name__)

PACKET_BYTES = 1 << 16  # at most; a multiple of a row's size
EMPTY = b"\0"  # no row is that short, and no packet at all is how the end of the connection looks
SLOW_S = 5.0  # for so long what does not fit into the socket waits for its reader
HELLO_BYTES = 1024


class Line:
    """The engine's end. `send` is for the engine's thread and never waits; what it could not send is for
    `take` and `finish`, on a thread that may. Packets stay in order. After OSError the line is closed."""

    def __init__(self, address: str, secret: str) -> None:
        """Raises OSError if nobody listens there."""
        self._lock = threading.Lock()
        self._left = bytearray()
        self._is_taken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(SLOW_S)
            self._socket.connect("\0" + address)
            self._socket.send(secret.encode())
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    def send(self, rows: bytes) -> bool:
        """Rows, or none to say that the engine works. False: some of them wait for `finish`. Raises OSError
        when nobody reads any more."""
        with self._lock:
            if self._is_taken:
                self._left += rows
                return False
            if self._left:
                rows = bytes(self._left) + rows
                self._left.clear()
            try:
                sent = self._write(rows)
            except OSError:
                self._socket.close()
                raise
            if sent == len(rows):
                return True
            self._left += rows[sent:]
            return False

    def finish(self) -> None:
        """Send what is left, however long it takes up to SLOW_S. Raises OSError."""
        with self._lock:
            rows, self._is_taken = bytes(self._left), True
            self._left.clear()
        try:
            while rows:
                rows = rows[self._write(rows) :]
                if rows and not select.select([], [self._socket], [], SLOW_S)[1]:
                    raise TimeoutError("inference does not read")
        except OSError:
            self._socket.close()
            raise
        finally:
            with self._lock:
                self._is_taken = False

    def is_open(self) -> bool:
        """Whether somebody still listens."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()

    def _write(self, rows: bytes) -> int:
        """How many bytes of them fit now, in whole packets."""
        sent = 0
        try:
            if len(rows) <= PACKET_BYTES:
                self._socket.send(rows or EMPTY)
                return len(rows)
            while sent < len(rows):
                sent += self._socket.send(rows[sent : sent + PACKET_BYTES])
        except BlockingIOError:
            pass
        return sent


class Listener:
    """Inference's end: `on_rows` gets each packet, b"" for an empty one; `on_end` is called when the engine's
    process is gone. Both are called on the event loop, where this is made. Without abstract names (not Linux)
    `address` is empty and nobody ever comes."""

    def __init__(self, secret: str, on_rows: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self.address = ""
        self._secret = secret.encode()
        self._on_rows, self._on_end = on_rows, on_end
        self._loop = asyncio.get_running_loop()
        self._open: list[socket.socket] = []
        address = f"lingqu-{uuid.uuid4().hex}"
        try:
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listening.bind("\0" + address)
        except (OSError, AttributeError) as err:
            log.warning("tokens take the way through Triton: %s", err)
            return
        listening.listen(1)
        self.address = address
        self._watch(listening, lambda: self._accept(listening))

    def close(self) -> None:
        for each in list(self._open):
            self._leave(each)

    def _watch(self, each: socket.socket, ready: Callable[[], None]) -> None:
        each.setblocking(False)
        self._open.append(each)
        self._loop.add_reader(each.fileno(), ready)

    def _leave(self, each: socket.socket) -> None:
        self._open.remove(each)
        self._loop.remove_reader(each.fileno())
        each.close()

    def _accept(self, listening: socket.socket) -> None:
        try:
            line, _ = listening.accept()
        except OSError:
            return
        self._watch(line, lambda: self._greet(line))

    def _greet(self, line: socket.socket) -> None:
        """The first packet: only the engine's process knows the secret. Nobody else is expected then."""
        try:
            hello = line.recv(HELLO_BYTES)
        except BlockingIOError:
            return
        except OSError:
            hello = b""
        if not hmac.compare_digest(hello, self._secret):
            self._leave(line)
            return
        for other in [each for each in self._open if each is not line]:
            self._leave(other)
        self._loop.add_reader(line.fileno(), self._read, line)

    def _read(self, line: socket.socket) -> None:
        while line in self._open:
            try:
                packet = line.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._leave(line)
                self._on_end()
                return
            self._on_rows(b"" if packet == EMPTY else packet)
