"""An OpenAI-compatible server that computes nothing: the same answer at once, or 64 chunks as server-sent
events if the body asks for a stream. Run as `python -m bench.mock HOST:PORT`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

import uvloop

CHUNKS = 64
_COMMON = {"id": "chatcmpl-0", "created": 0, "model": "mock", "system_fingerprint": None}
_USAGE = {"prompt_tokens": 8, "completion_tokens": CHUNKS, "total_tokens": 8 + CHUNKS}


def _whole() -> bytes:
    message = {"role": "assistant", "content": "word " * CHUNKS}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = json.dumps({**_COMMON, "object": "chat.completion", "choices": choices, "usage": _USAGE}).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


def _streamed() -> bytes:
    deltas = [{"content": "word "} for _ in range(CHUNKS)]
    events = [
        {"index": 0, "delta": delta, "finish_reason": "stop" if number == CHUNKS - 1 else None}
        for number, delta in enumerate(deltas)
    ]
    lines = [
        json.dumps({**_COMMON, "object": "chat.completion.chunk", "choices": [event]}) for event in events
    ]
    out = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    for line in [*lines, "[DONE]"]:
        data = f"data: {line}\n\n".encode()
        out += b"%x\r\n%b\r\n" % (len(data), data)
    return out + b"0\r\n\r\n"


WHOLE, STREAMED = _whole(), _streamed()


class Mock(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._unread = b""

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while (end := self._unread.find(b"\r\n\r\n")) >= 0:
            head = self._unread[:end].lower()
            if b"transfer-encoding: chunked" in head:
                stop = self._unread.find(b"0\r\n\r\n", end + 4)
                size = stop + 5 if stop >= 0 else len(self._unread) + 1
            else:
                at = head.find(b"content-length:")
                length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
                size = end + 4 + length
            if len(self._unread) < size:
                return
            body, self._unread = self._unread[end:size], self._unread[size:]
            streams = b'"stream":true' in body.replace(b" ", b"")
            self._transport.write(STREAMED if streams else WHOLE)


async def main(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    server = await asyncio.get_running_loop().create_server(Mock, host, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
