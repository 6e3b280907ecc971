"""Many streams of generated text at once, timed by a process that does little else.

`python -m bench.stream_client` reads a JSON line for each measurement, {"protocol": "grpc" or "sse",
"address", "key", "model", "prompts", "max_tokens"}, opens a stream for every prompt at once, and answers with
{"seconds", "tokens", "first_ms": […], "gaps_ms": […]}: until the last stream has ended, the usage of all, the
delay of each stream's first text, and the times between two messages of a stream.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import uvloop

from bench.http2 import GrpcConnection
from lingqu.inference.v1 import inference_pb2 as pb

GRPC_PATH = "/lingqu.inference.v1.InferenceService/StreamGenerate"
STREAMS_PER_CONNECTION = 64


@dataclass(slots=True)
class Stream:
    """When messages with text came, and what the server says it made."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0


class Generations(GrpcConnection):
    """StreamGenerate calls of one connection."""

    def __init__(self, authority: str, key: str) -> None:
        super().__init__(GRPC_PATH, authority, {"authorization": f"Bearer {key}"})
        self.streams: dict[int, Stream] = {}
        self._last: dict[int, bytes] = {}
        self._left = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, requests: list[bytes]) -> None:
        self._left = len(requests)
        for request in requests:
            self.streams[self.call(request)] = Stream()

    def message(self, at: float, stream: int, message: bytes) -> None:
        self.streams[stream].times.append(at)
        self._last[stream] = message

    def ended(self, at: float, stream: int, well: bool) -> None:
        if self.done.done():
            return
        last = self._last.get(stream)
        if not well or last is None:
            self.done.set_exception(ConnectionError(f"stream {stream} of {len(self.streams)} ended early"))
            return
        self.streams[stream].tokens = pb.GenerateChunk.FromString(last).usage.completion_tokens
        self._left -= 1
        if not self._left:
            self.done.set_result(None)


async def grpc_streams(asked: dict[str, Any]) -> tuple[float, list[Stream]]:
    """When the calls began, and what came of them."""
    host, _, port = asked["address"].rpartition(":")
    loop = asyncio.get_running_loop()
    requests = [
        pb.GenerateRequest(
            model=asked["model"], prompt=prompt, max_tokens=asked["max_tokens"], no_cache=True
        ).SerializeToString()
        for prompt in asked["prompts"]
    ]
    groups = [
        requests[i : i + STREAMS_PER_CONNECTION] for i in range(0, len(requests), STREAMS_PER_CONNECTION)
    ]
    connections = []
    for _ in groups:
        make = lambda: Generations(asked["address"], asked["key"])  # noqa: E731
        _, connection = await loop.create_connection(make, host, int(port))
        connections.append(connection)
    await asyncio.sleep(0.05)  # settings of both sides have come
    begun = time.monotonic()
    for connection, group in zip(connections, groups, strict=True):
        connection.begin(group)
    await asyncio.gather(*(connection.done for connection in connections))
    for connection in connections:
        connection.close()
    return begun, [stream for connection in connections for stream in connection.streams.values()]


async def sse_stream(asked: dict[str, Any], prompt: str) -> Stream:
    """One OpenAI completion, streamed over a connection of its own."""
    host, _, port = asked["address"].rpartition(":")
    body = json.dumps(
        {
            "model": asked["model"],
            "prompt": prompt,
            "max_tokens": asked["max_tokens"],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {asked['address']}\r\n"
        f"authorization: Bearer {asked['key']}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + body)
    stream, last = Stream(), b""
    status = await reader.readline()
    if b" 200 " not in status:
        raise ConnectionError(f"{asked['address']} answered {status.decode().strip()}")
    while line := await reader.readline():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        last = line
        if b'"choices":[]' not in line.replace(b": ", b":"):
            stream.times.append(time.monotonic())
    writer.close()
    stream.tokens = json.loads(last[6:])["usage"]["completion_tokens"]
    return stream


async def measure(asked: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    if asked["protocol"] == "grpc":
        begun, streams = await grpc_streams(asked)
    else:
        streams = list(await asyncio.gather(*(sse_stream(asked, prompt) for prompt in asked["prompts"])))
    last = max(stream.times[-1] for stream in streams)
    return {
        "seconds": last - begun,
        "tokens": sum(stream.tokens for stream in streams),
        "first_ms": [(stream.times[0] - begun) * 1000 for stream in streams],
        "gaps_ms": [(b - a) * 1000 for s in streams for a, b in itertools.pairwise(s.times)],
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(uvloop.run(measure(json.loads(line)))), flush=True)
