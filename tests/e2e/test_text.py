"""Text through the public port: right, streamed, cancelled when nobody listens, refused precisely."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lingqu
from bench.suite import Suite
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from services.core.discovery import VersionKey
from services.gateway.keys import AUDIENCE, ISSUER, KeyRing
from services.inference.artifact import Manifest
from services.inference.backends.jobs import Sampling
from services.inference.session import Session
from services.inference.triton import Triton
from tests.engine import idle, session_secret

PROMPT = "The canal joined two rivers and"


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[lingqu.Client]:
    async with lingqu.Client(suite.public, suite.key, timeout=30) as client:
        yield client


async def refused(suite: Suite, key: str | None = None, **fields: Any) -> lingqu.LingquError:
    """The error of Generate with a request of these fields; by default the key is good."""
    secret = suite.key if key is None else key
    async with lingqu.Client(suite.public, secret, timeout=20) as client:
        with pytest.raises(lingqu.LingquError) as caught:
            await client.generate(**{"model": TEXT_MODEL, "prompt": "hello", **fields})
    return caught.value


async def test_greedy_text_is_the_engines_own(client: lingqu.Client, artifacts: dict[str, Path]) -> None:
    """The golden tokens were computed by the engine alone; here they come through every part."""
    for golden in Manifest.read(artifacts[TEXT_MODEL]).golden_texts:
        length = len(golden.token_ids)
        answer = await client.generate(TEXT_MODEL, golden.prompt, max_tokens=length, no_cache=True)
        again = await client.generate(TEXT_MODEL, golden.prompt, max_tokens=length, no_cache=True)
        assert answer == again
        assert answer.usage.prompt_tokens == len(golden.prompt_ids)
        assert answer.usage.completion_tokens == len(golden.token_ids)
        assert answer.text
        assert answer.model_version == "1"


class Counted:
    """A call whose messages are counted."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.cancel = call.cancel
        self.messages = 0

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for message in self._call:
            self.messages += 1
            yield message


@pytest.mark.parametrize("is_reached", [True, False], ids=["a line", "no line"])
async def test_tokens_come_past_triton_or_where_that_cannot_be_through_it(
    suite: Suite, artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, is_reached: bool
) -> None:
    golden = Manifest.read(artifacts[TEXT_MODEL]).golden_texts[0]
    triton, length = Triton(suite.triton), len(golden.token_ids)
    calls: list[Counted] = []

    def stream(requests: AsyncIterator[Any]) -> Counted:
        calls.append(Counted(triton_stream(requests)))
        return calls[0]

    triton_stream = triton.stream
    monkeypatch.setattr(triton, "stream", stream)
    if not is_reached:  # as from another machine
        monkeypatch.setattr(socket.socket, "listen", lambda *_: None)
    session = Session(triton, VersionKey(TEXT_MODEL, 1), session_secret(suite), 8)
    steps = [step async for step in session.generate(list(golden.prompt_ids), Sampling(length))]
    await session.close()
    await triton.close()
    assert [token for step in steps for token in step.tokens] == list(golden.token_ids)
    (call,) = calls
    assert call.messages == 1 if is_reached else call.messages > 2, "the first takes the prompt"


async def test_a_stream_adds_up_to_the_whole(client: lingqu.Client) -> None:
    whole = await client.generate(TEXT_MODEL, PROMPT, max_tokens=20)
    chunks = [chunk async for chunk in client.stream(TEXT_MODEL, PROMPT, max_tokens=20, no_cache=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len(chunks) > 5
    assert all(not c.finish_reason and not c.HasField("usage") for c in chunks[:-1])
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage == whole.usage


async def test_a_chat_uses_the_models_template_and_ends_by_itself(client: lingqu.Client) -> None:
    messages = [("system", "Answer in one word."), ("user", "What is the capital of France?")]
    answer = await client.generate(TEXT_MODEL, messages=messages, max_tokens=200)
    assert "Paris" in answer.text
    assert answer.finish_reason == pb.FINISH_REASON_STOP
    assert "<|im_" not in answer.text


async def test_stop_strings_end_the_text(client: lingqu.Client) -> None:
    whole = (await client.generate(TEXT_MODEL, PROMPT, max_tokens=60)).text
    stop = whole[20:26]
    answer = await client.generate(TEXT_MODEL, PROMPT, max_tokens=60, stop=[stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == pb.FINISH_REASON_STOP
    fields = {"max_tokens": 60, "stop": [stop], "no_cache": True}
    streamed = [c.text async for c in client.stream(TEXT_MODEL, PROMPT, **fields)]
    assert "".join(streamed) == answer.text


async def test_sampling_is_seeded(client: lingqu.Client) -> None:
    def sampled(seed: int) -> Any:
        drawn = {"temperature": 1.2, "top_p": 0.95, "seed": seed, "no_cache": True}
        return client.generate(TEXT_MODEL, PROMPT, max_tokens=24, **drawn)

    one, same, other = [(await sampled(seed)).text for seed in (1, 1, 2)]
    assert one == same
    assert one != other


async def test_many_streams_at_once_do_not_mix(client: lingqu.Client) -> None:
    """Each counts on from a number of its own: what another stream got would show."""

    async def counted(start: int) -> str:
        prompt = ", ".join(str(start + n) for n in range(8)) + ","
        return "".join([c.text async for c in client.stream(TEXT_MODEL, prompt, max_tokens=12)])

    starts = range(100, 900, 25)
    texts = await asyncio.gather(*map(counted, starts))
    assert [text.split(",")[0].strip() for text in texts] == [str(start + 8) for start in starts]


# --- What is refused, and how -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * ((1 << 20) + 1)}, "prompt"),
        ({"prompt": "word " * 9000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"temperature": 3.0}, "temperature"),
        ({"prompt": "", "messages": [("oracle", "hello")]}, "messages[0].role"),
        ({"prompt": "", "messages": [("user", "word " * 9000)]}, "messages"),
        ({"model": ""}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"model": "x" * 10_000}, "model"),
        ({"model": VECTOR_MODEL}, "model"),
    ],
)
async def test_bad_input_names_its_field(suite: Suite, fields: dict[str, Any], field: str) -> None:
    error = await refused(suite, **fields)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("tail", [b"\x12\x03\xff\xfe\xfd", b"\xff\xff\xff\xff", b"\x12\x7f"])
async def test_what_is_no_message_is_refused_as_such(suite: Suite, tail: bytes) -> None:
    raw = pb.GenerateRequest(model=TEXT_MODEL).SerializeToString() + tail
    metadata = (("authorization", f"Bearer {suite.key}"),)
    service = "/lingqu.inference.v1.InferenceService"
    async with grpc.aio.insecure_channel(suite.public) as channel:
        stream: Any = channel.unary_stream(f"{service}/StreamGenerate")(raw, metadata=metadata, timeout=10)
        unary: Any = channel.unary_unary(f"{service}/Generate")(raw, metadata=metadata, timeout=10)
        for answer in (unary, stream.read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            error = lingqu.LingquError(caught.value)
            assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request")


METHODS = ("Generate", "Embed", "Classify", "Answer", "Score", "Tokenize")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(METHODS), at=st.integers(0, 60), noise=st.binary(max_size=60))
def test_no_bytes_are_an_internal_error(suite: Suite, method: str, at: int, noise: bytes) -> None:
    """From the client through the gateway, which reads the message, too."""
    good = pb.GenerateRequest(model=TEXT_MODEL, prompt="x", max_tokens=1).SerializeToString()
    metadata = (("authorization", f"Bearer {suite.key}"),)
    with grpc.insecure_channel(suite.public) as channel:
        call: Any = channel.unary_unary(f"/lingqu.inference.v1.InferenceService/{method}")
        try:
            call(good[:at] + noise + good[at:], metadata=metadata, timeout=20)
        except grpc.RpcError as err:
            error: Any = err
            code = error.code()
        else:
            code = grpc.StatusCode.OK
    assert code in (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


async def test_an_unknown_model_is_not_found_by_name(suite: Suite) -> None:
    error = await refused(suite, model="gpt-9")
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "gpt-9" in str(error)


async def test_without_a_good_key_nothing_is_answered(suite: Suite) -> None:
    now = int(time.time())
    ring = KeyRing.at(suite.layout.state / "gateway" / "signing.pem")
    private = ring._private  # the test signs what the ring itself would not
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "eve", "exp": now + 600}
    keys = {
        "none": "",
        "garbage": "abc",
        "expired": jwt.encode({**claims, "exp": now - 120}, private, algorithm="EdDSA"),
        "of another issuer": jwt.encode({**claims, "iss": "other"}, private, algorithm="EdDSA"),
        "of another signer": jwt.encode(claims, Ed25519PrivateKey.generate(), algorithm="EdDSA"),
        "that never expires": jwt.encode(
            {k: v for k, v in claims.items() if k != "exp"}, private, algorithm="EdDSA"
        ),
        "unsigned": jwt.encode(claims, None, algorithm="none"),
    }
    for name, key in keys.items():
        error = await refused(suite, key=key)
        assert (name, error.code, error.reason) == (name, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    good = jwt.encode(claims, private, algorithm="EdDSA")
    async with lingqu.Client(suite.public, good) as client:
        assert (await client.generate(TEXT_MODEL, "hello", max_tokens=1)).usage.completion_tokens == 1


async def test_the_scheme_may_be_written_small(suite: Suite) -> None:
    async with grpc.aio.insecure_channel(suite.public) as channel:
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="hello", max_tokens=1)
        metadata = (("authorization", f"bearer {suite.key}"),)
        answer = await InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=10)
        assert answer.model_version


async def test_no_header_of_a_client_chooses_version_or_model(suite: Suite) -> None:
    async with grpc.aio.insecure_channel(suite.public) as channel:
        metadata = (
            ("authorization", f"Bearer {suite.key}"),
            ("x-lingqu-model-version", "99"),
            ("x-lingqu-model", "other"),
            ("x-lingqu-client", "root"),
        )
        request = pb.GenerateRequest(model=TEXT_MODEL, prompt="hello", max_tokens=1)
        answer = await InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=10)
        assert answer.model_version == "1"


# --- When nobody waits any more -----------------------------------------------------------------------


async def test_a_client_that_goes_away_stops_the_engine(suite: Suite, client: lingqu.Client) -> None:
    before = await idle(suite)
    received = 0
    stream = client.stream(TEXT_MODEL, "Count: 1 2 3 4 5 6 7", max_tokens=4000)
    async for _ in stream:
        received += 1
        if received == 10:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    computed = await idle(suite) - before
    # What was on its way, and a step or two; not the thousands that were asked for.
    assert received <= computed <= received + 10


async def test_a_connection_that_breaks_stops_the_engine(suite: Suite) -> None:
    before = await idle(suite)
    channel = grpc.aio.insecure_channel(suite.public)
    request = pb.GenerateRequest(model=TEXT_MODEL, prompt="Count: 1 2 3 4 5 6 7", max_tokens=4000)
    call: Any = InferenceServiceStub(channel).StreamGenerate(
        request, metadata=(("authorization", f"Bearer {suite.key}"),)
    )
    for _ in range(5):
        await call.read()
    await channel.close(grace=None)
    computed = await idle(suite) - before
    assert computed < 200


async def test_a_deadline_stops_the_engine(suite: Suite) -> None:
    before = await idle(suite)
    async with lingqu.Client(suite.public, suite.key, timeout=0.5) as client:
        with pytest.raises(lingqu.LingquError) as caught:
            await client.generate(TEXT_MODEL, "Count: 1 2 3 4 5 6 7", max_tokens=8000)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    computed = await idle(suite) - before
    assert computed < 1000
