"""A thin asynchronous client: the generated stubs, a key, and retries where they are safe."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub

T = TypeVar("T")
Messages = Iterable[tuple[str, str]]
WAIT_FIRST_S = 0.1
WAIT_MOST_S = 2.0
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def channel_options(address: str) -> list[tuple[str, int]]:
    """A proxy that the environment names is for other machines, not for this one."""
    local = address.startswith(("127.", "localhost:", "[::1]:"))
    return [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if local else 1)]


def connected(
    address: str,
    ca: Path | str | bool | None = None,
    certificate: tuple[Path | str, Path | str] | None = None,
) -> grpc.aio.Channel:
    """A channel, with TLS where there is a `ca`; the arguments are those of Client. Raises OSError."""
    if not ca:
        return grpc.aio.insecure_channel(address, options=channel_options(address))
    trusted = None if ca is True else Path(ca).read_bytes()
    own, key = (Path(path).read_bytes() for path in certificate) if certificate else (None, None)
    credentials = grpc.ssl_channel_credentials(trusted, key, own)
    return grpc.aio.secure_channel(address, credentials, options=channel_options(address))


class LingquError(Exception):
    """A call failed: `code` is the gRPC status, `reason` the machine-readable cause (ErrorInfo), `field` the
    field of the request that is wrong, if one is."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(error.details() or error.code().name)
        self.code: grpc.StatusCode = error.code()
        self.reason = ""
        self.field = ""
        self.retry_after_s: float | None = None
        status = _status(error)
        for detail in status.details if status is not None else ():
            self._read(detail)

    def _read(self, detail: Any) -> None:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            self.reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            self.field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            self.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()


class Client:
    """One connection to a suite; use it as `async with lingqu.Client(key=…) as client`.

    `timeout` bounds every call in seconds, retries included. Calls are retried while the suite is
    unavailable; a stream only as long as nothing of it has arrived. `ca` is the PEM file of the CA that the
    suite's certificate is from, or True for those that are known to everybody; None: without TLS.
    `certificate` are PEM files of a client certificate and its key, in place of an API key."""

    def __init__(
        self,
        address: str = "127.0.0.1:8080",
        key: str = "",
        timeout: float = 120.0,
        *,
        ca: Path | str | bool | None = None,
        certificate: tuple[Path | str, Path | str] | None = None,
    ) -> None:
        self._channel = connected(address, ca, certificate)
        self._stub = InferenceServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._timeout = timeout

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self, model: str, prompt: str = "", messages: Messages = (), **sampling: Any
    ) -> pb.GenerateResponse:
        """The whole answer. `messages` are (role, content) pairs; `sampling` the fields of GenerateRequest:
        max_tokens, temperature, top_p, top_k, min_p, seed, stop, penalties, n, logprobs, response_format,
        tools, priority, no_cache. Raises LingquError."""
        request = _request(model, prompt, messages, sampling)
        return await self._retried(
            lambda left: self._stub.Generate(request, timeout=left, metadata=self._metadata)
        )

    async def stream(
        self, model: str, prompt: str = "", messages: Messages = (), **sampling: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        """The answer piece by piece; leaving the iteration stops the computation. Raises LingquError."""
        request = _request(model, prompt, messages, sampling)
        call: Any = None

        async def first(left: float) -> Any:
            nonlocal call
            call = self._stub.StreamGenerate(request, timeout=left, metadata=self._metadata)
            return await call.read()

        try:
            chunk = await self._retried(first)
            while chunk is not grpc.aio.EOF:
                yield chunk
                chunk = await call.read()
        except grpc.aio.AioRpcError as error:
            raise LingquError(error) from error
        finally:
            if call is not None:
                call.cancel()

    async def embed(self, model: str, inputs: Sequence[str], **options: Any) -> pb.EmbedResponse:
        """A vector for each text. `options` are fields of EmbedRequest: dimensions, normalize, truncation,
        priority. Raises LingquError."""
        request = pb.EmbedRequest(model=model, inputs=inputs, **options)
        return await self._retried(
            lambda left: self._stub.Embed(request, timeout=left, metadata=self._metadata)
        )

    async def classify(self, model: str, inputs: Sequence[str], **options: Any) -> pb.ClassifyResponse:
        """The labels of each text, best first. `options` are fields of ClassifyRequest: top, truncation,
        priority. Raises LingquError."""
        request = pb.ClassifyRequest(model=model, inputs=inputs, **options)
        return await self._retried(
            lambda left: self._stub.Classify(request, timeout=left, metadata=self._metadata)
        )

    async def answer(self, model: str, question: str, context: str, **options: Any) -> pb.AnswerResponse:
        """Where the context answers the question, best first; nothing where the model says that it does not.
        `options` are fields of AnswerRequest: top, max_answer_tokens, priority. Raises LingquError."""
        request = pb.AnswerRequest(model=model, question=question, context=context, **options)
        return await self._retried(
            lambda left: self._stub.Answer(request, timeout=left, metadata=self._metadata)
        )

    async def score(self, model: str, inputs: Sequence[str], **options: Any) -> pb.ScoreResponse:
        """How likely a text model finds each text. `options` are fields of ScoreRequest: prefix, tokens,
        priority. Raises LingquError."""
        request = pb.ScoreRequest(model=model, inputs=inputs, **options)
        return await self._retried(
            lambda left: self._stub.Score(request, timeout=left, metadata=self._metadata)
        )

    async def tokenize(
        self, model: str, text: str = "", messages: Messages = (), **options: Any
    ) -> pb.TokenizeResponse:
        """The model's tokens of a text, or of a chat of (role, content) pairs. Raises LingquError."""
        turns = [pb.Message(role=role, content=content) for role, content in messages]
        request = pb.TokenizeRequest(model=model, text=text, messages=turns, **options)
        return await self._retried(
            lambda left: self._stub.Tokenize(request, timeout=left, metadata=self._metadata)
        )

    async def _retried(self, call: Callable[[float], Awaitable[T]]) -> T:
        deadline = time.monotonic() + self._timeout
        wait = WAIT_FIRST_S
        while True:
            try:
                return await call(max(0.001, deadline - time.monotonic()))
            except grpc.aio.AioRpcError as error:
                failure = LingquError(error)
                pause = max(wait, failure.retry_after_s or 0) * random.uniform(0.5, 1)  # noqa: S311
                if failure.code != grpc.StatusCode.UNAVAILABLE or time.monotonic() + pause > deadline:
                    raise failure from error
                wait = min(WAIT_MOST_S, wait * 2)
            await asyncio.sleep(pause)


def _request(model: str, prompt: str, messages: Messages, sampling: dict[str, Any]) -> pb.GenerateRequest:
    turns = [pb.Message(role=role, content=content) for role, content in messages]
    return pb.GenerateRequest(model=model, prompt=prompt, messages=turns, **sampling)


def _status(error: grpc.aio.AioRpcError) -> Any:
    """The google.rpc.Status of an error, or None if it has none or a broken one."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None
