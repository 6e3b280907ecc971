"""What somebody may try to get past a real Envoy with the gateway's own configuration: forged keys, odd
paths, messages that name a model twice, headers of the suite's own."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as oip

from bench.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, frame, literal
from services.core.access import Access, Client
from services.core.errors import InvalidInput, ModelNotFound
from services.core.identity import AUDIENCE, ISSUER
from services.gateway.filters.authentication import Issuer
from services.gateway.keys import KeyRing
from services.inference.callers import routed_version
from tests.gates import CHAT, GENERATE, INFER, STREAM, Calls, Gate, field_of, gate, signed
from tests.waiting import until

ALLOWED, SECRET = "alone", "secret"


@pytest.fixture(scope="module", params=[False, True], ids=["", "pinned, another issuer"])
async def entry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gate]:
    """Client "tester" may call one model of two. Pinned: tensor requests are given a version on their way."""
    access = Access((Client("tester", (ALLOWED,)),))
    folder = tmp_path_factory.mktemp("attacks")
    other = KeyRing([Ed25519PrivateKey.generate()]).jwks()
    issuers = (Issuer("corp", "https://id", ("lingqu",), json.dumps(other)),) if request.param else ()
    async with gate(folder, (ALLOWED, SECRET), access, pinned=request.param, issuers=issuers) as found:
        yield found


# --- Keys ---------------------------------------------------------------------------------------------


def part(value: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


def forged(entry: Gate) -> dict[str, str]:
    """Keys that must not work, by what is wrong with them."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "tester", "exp": now + 600, "jti": "x"}
    (public,) = (key for key in entry.keys.jwks()["keys"][:1])  # type: ignore[index]
    kid = public["kid"]
    stranger = Ed25519PrivateKey.generate()
    raw = base64.urlsafe_b64decode(public["x"] + "==")
    spki = (
        serialization.load_der_public_key(b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00" + raw)
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )  # fmt: skip
    jwk = json.dumps(public).encode()

    def hs256(secret: bytes, **header: str) -> str:
        """The classic: the public key, which everybody has, taken for a shared secret."""
        signed_part = part({"alg": "HS256", "typ": "JWT", **header}) + b"." + part(claims)
        mac = hmac.new(secret, signed_part, hashlib.sha256).digest()
        return (signed_part + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()

    good = signed(entry.keys)
    head, body, signature = good.split(".")
    return {
        "nothing": "",
        "none": jwt.encode(claims, None, algorithm="none"),
        "none with the key's id": jwt.encode(claims, None, algorithm="none", headers={"kid": kid}),
        "None": (part({"alg": "None", "kid": kid}) + b"." + part(claims) + b".").decode(),
        "none, signature of another": (part({"alg": "none"}) + b"." + body.encode()).decode()
        + "."
        + signature,
        "no signature": f"{head}.{body}.",
        "no third part": f"{head}.{body}",
        "changed claims": f"{head}.{part({**claims, 'sub': 'root'}).decode()}.{signature}",
        "changed signature": f"{head}.{body}.{'A' * len(signature)}",
        "signed by a stranger": jwt.encode(claims, stranger, algorithm="EdDSA"),
        "signed by a stranger under our id": jwt.encode(
            claims, stranger, algorithm="EdDSA", headers={"kid": kid}
        ),
        "HS256 with the raw key": hs256(raw, kid=kid),
        "HS256 with the PEM": hs256(spki, kid=kid),
        "HS256 with the PEM, no id": hs256(spki),
        "HS256 with the key's JSON": hs256(jwk, kid=kid),
        "HS256 with its text": hs256(public["x"].encode(), kid=kid),
        "a key of its own inside": jwt.encode(
            claims,
            stranger,
            algorithm="EdDSA",
            headers={
                "jwk": {
                    "kty": "OKP",
                    "crv": "Ed25519",
                    "x": base64.urlsafe_b64encode(stranger.public_key().public_bytes_raw())
                    .decode()
                    .rstrip("="),
                }
            },
        ),
        "other issuer": signed(entry.keys, iss="somebody"),
        "no issuer": signed(entry.keys, iss=""),
        "expired": signed(entry.keys, exp=now - 60),
        "never expires": entry.keys.sign({k: v for k, v in claims.items() if k != "exp"}),
        "not yet valid": signed(entry.keys, nbf=now + 600),
        "other audience": signed(entry.keys, aud="others"),
        "no audience": entry.keys.sign({k: v for k, v in claims.items() if k != "aud"}),
        "ten kilobytes of nothing": "x" * 10_000,
        "two keys": f"{good}, {good}",
        "a space in it": good[:20] + " " + good[20:],
    }


async def test_no_forged_key_works(entry: Gate) -> None:
    for what, key in forged(entry).items():
        calls = Calls(entry.address, key)
        denied = what in ("other audience", "no audience")
        code, reason = await calls.grpc(INFER, field_of(1, ALLOWED.encode()))
        wanted = ("PERMISSION_DENIED",) * 2 if denied else ("UNAUTHENTICATED",) * 2
        assert (code, reason) == wanted, what
        status = await answered(entry, f"POST {CHAT}", f"authorization: Bearer {key}")
        assert status == (403 if denied else 401), what
    assert await Calls(entry.address, signed(entry.keys)).grpc(INFER, field_of(1, b"alone")) == ("OK", "")


async def test_a_refused_key_is_told_why(entry: Gate) -> None:
    now = int(time.time())
    for key, words in {
        signed(entry.keys, exp=now - 60): "the key has expired",
        signed(entry.keys, nbf=now + 600): "the key is not valid yet",
        signed(entry.keys, aud="others"): "the key is not for this suite",
        signed(entry.keys, iss="somebody"): "of another issuer",
        "nonsense": "malformed",
    }.items():
        async with grpc.aio.insecure_channel(entry.address) as channel:
            call: Any = channel.unary_unary(INFER)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", metadata=(("authorization", f"Bearer {key}"),), timeout=10)
            assert words in str(refused.value.details())


async def test_a_key_in_a_url_or_elsewhere_is_no_key(entry: Gate) -> None:
    key = signed(entry.keys)
    for query in (f"?access_token={key}", f"?key={key}", f"?authorization=Bearer%20{key}"):
        assert await answered(entry, f"POST {CHAT}{query}") == 401
    for header in (f"x-api-key: {key}", f"cookie: authorization={key}", f"authorization: {key}"):
        assert await answered(entry, f"POST {CHAT}", header) == 401
    assert await answered(entry, f"POST {CHAT}", f"authorization: Bearer {key}") == 200


async def test_clocks_may_differ_by_a_second_and_no_more(entry: Gate) -> None:
    now = time.time()
    ahead = Calls(entry.address, signed(entry.keys, nbf=now + 600))
    assert (await ahead.grpc(INFER, field_of(1, b"alone")))[0] == "UNAUTHENTICATED"
    barely = Calls(entry.address, signed(entry.keys, nbf=int(now) + 1))
    assert (await barely.grpc(INFER, field_of(1, b"alone")))[0] == "OK"


# --- Paths --------------------------------------------------------------------------------------------


async def answered(entry: Gate, line: str, *headers: str, body: bytes = b'{"model": "alone"}') -> int:
    """The status of a request that is written as it is."""
    reader, writer = await asyncio.open_connection(*entry.address.split(":"))
    head = [f"{line} HTTP/1.1", "host: x", f"content-length: {len(body)}", "connection: close", *headers]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    try:
        async with asyncio.timeout(10):
            answer = await reader.readline()
    finally:
        writer.close()
    return int(answer.split(b" ", 2)[1])


SPELLINGS = (
    "/v1//chat/completions", "//v1/chat/completions", "/v1/chat%2fcompletions", "/v1/chat%2Fcompletions",
    "/v1%2Fchat%2fcompletions", "/v1/chat%5ccompletions", "/v1\\chat\\completions", "/v1/./chat/completions",
    "/v1/x/../chat/completions", "/v1/x/%2e%2e/chat/completions", "/v1/x%2f..%2fchat/completions",
    "/v1/chat/completion%73", "/%76%31/chat/completions", "/v1/chat/completions%00", "/V1/CHAT/COMPLETIONS",
    "/v1/chat/completions/", "/v1/chat/completions;x", "/v1/chat/completions?model=secret",
    "/v1/chat/completions#x", "/v1/chat/completions%23x", "/v1/chat/completions%3fx",
    "/v1/chat%252fcompletions", "/v1/x%2f%2e%2e%2fchat/completions",
    "/grpc.health.v1.Health/../v1/chat/completions", "/grpc.health.v1.Health/..%2fv1/chat/completions",
    "/grpc.health.v1.Health/%2e%2e/v1/chat/completions", "/grpc.health.v1.Health//../../v1/chat/completions",
    "/grpc.health.v1.Health/%2e%2e%2fv1/chat/completions",
    "/grpc.health.v1.Health\\..\\v1\\chat\\completions",
    "/grpc.health.v1.Health/;/../../v1/chat/completions", "/openapi.json/../v1/chat/completions",
    "http://else.where/v1/chat/completions", "http://else.where/grpc.health.v1.Health/../v1/chat/completions",
)  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
async def test_no_spelling_of_a_path_gets_past_the_key_or_the_list(entry: Gate, path: str) -> None:
    entry.rest.calls.clear()
    assert await answered(entry, f"POST {path}") >= 400
    assert not entry.rest.calls
    await answered(
        entry, f"POST {path}", f"authorization: Bearer {signed(entry.keys)}", body=b'{"model": "secret"}'
    )
    for call in entry.rest.calls:
        # What Envoy let pass without looking at the body is no path of a service that would read one. What it
        # has read says so to inference.
        assert "%2f" not in call.path.lower()
        assert call.headers.get("x-lingqu-model") != SECRET
        with pytest.raises((InvalidInput, ModelNotFound)):
            routed_version(SECRET, call.headers)


@pytest.mark.parametrize(
    "path",
    [
        "/inference.GRPCInferenceService/../inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService//ModelInfer",
        "//inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelInfer?x=1",
        "/inference.GRPCInferenceService/ModelInfer/",
        "/inference.GRPCInferenceService%2fModelInfer",
        "/inference.GRPCInferenceService/ServerLive/../ModelInfer",
        "/inference.GRPCInferenceService/ServerLiveX",
        "/inference.GRPCInferenceService/ServerLive?/../ModelInfer",
        "/inference.GRPCInferenceService/modelinfer",
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
    ],
)
async def test_no_spelling_of_a_method_reaches_a_model(entry: Gate, path: str) -> None:
    entry.tensor.calls.clear()
    await Calls(entry.address, signed(entry.keys)).grpc(path, field_of(1, SECRET.encode()))
    for call in entry.tensor.calls:
        assert call.path not in (INFER, STREAM), (
            "Triton takes a method for what is in its path, to the letter"
        )
        assert not call.path.endswith(("Load", "Register"))


# --- Names --------------------------------------------------------------------------------------------

BOTH = field_of(1, ALLOWED.encode()) + field_of(1, SECRET.encode())
TWO_NAMES = {
    "twice": BOTH,
    "thrice": field_of(1, ALLOWED.encode()) + BOTH,
    "at the end": field_of(1, ALLOWED.encode()) + field_of(7, b"x" * 100) + field_of(1, SECRET.encode()),
    "a longer tag": field_of(1, ALLOWED.encode()) + b"\x8a\x80\x00\x06secret",
    "a tag beyond 32 bits": field_of(1, ALLOWED.encode())
    + b"\x8a\x80\x80\x80\x10"
    + field_of(1, SECRET.encode())[1:],
    "a longer length": field_of(1, ALLOWED.encode()) + b"\x0a\x86\x80\x00" + SECRET.encode(),
    "behind a group": field_of(1, ALLOWED.encode()) + b"\x4b\x4c" + field_of(1, SECRET.encode()),
    "in a group": field_of(1, ALLOWED.encode()) + b"\x4b" + field_of(1, SECRET.encode()) + b"\x4c",
    "in a group alone": b"\x4b" + field_of(1, ALLOWED.encode()) + b"\x4c" + field_of(1, SECRET.encode()),
    "behind an unknown field": field_of(1, ALLOWED.encode())
    + field_of(15, b"x")
    + field_of(1, SECRET.encode()),
}


@pytest.mark.parametrize("message", TWO_NAMES.values(), ids=TWO_NAMES)
async def test_a_message_with_two_names_counts_as_the_one_that_its_reader_takes(
    entry: Gate, message: bytes
) -> None:
    calls = Calls(entry.address, signed(entry.keys))
    for path, backend, name in (
        (INFER, entry.tensor, lambda raw: oip.ModelInferRequest.FromString(raw).model_name),
        (GENERATE, entry.text, lambda raw: oip.ModelInferRequest.FromString(raw).model_name),
    ):
        backend.calls.clear()
        code, _ = await calls.grpc(path, message)
        for call in backend.calls:
            assert name(call.messages[0]) == ALLOWED
        if not backend.calls:
            assert code in ("PERMISSION_DENIED", "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "alone", "model": "secret"}', b'{"model": "secret", "model": "!"}',
        b'{"model": "!", "model": "secret"}', b'{"model": "alone", "mod\\u0065l": "secret"}',
        b'{"model": "secret", "x": 1e999}', b'{"model": "secret"} x', b'{"model": "secret", "x": NaN}',
        b'\xef\xbb\xbf{"model": "secret"}', b'{"model": "secret", "x": "\xff"}', b'{"model": "secret",}',
        b'{"model": "secret", "x": "\\ud800"}', b'{/**/"model": "secret"}',
        b'{"model": "secret", "model": 7}',
        b'{"x": {"model": "alone"}, "model": "secret"}',
        b'{"model": "secret", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)  # fmt: skip
async def test_no_body_reaches_a_model_that_the_gateway_has_not_read(entry: Gate, body: bytes) -> None:
    """Where the gateway reads another name or none, inference refuses whatever it may read itself."""
    entry.rest.calls.clear()
    await Calls(entry.address, signed(entry.keys)).rest(body)
    for call in entry.rest.calls:
        with pytest.raises((InvalidInput, ModelNotFound)):
            routed_version(SECRET, call.headers)


async def test_headers_of_the_suite_are_not_the_clients_to_set(entry: Gate) -> None:
    forged = {
        "x-lingqu-client": "root", "x-lingqu-model": SECRET, "x-lingqu-model-version": "9",
        "x-lingqu-key": "other", "x-lingqu-key-models": "*", "X-Lingqu-Client": "root",
        "x-lingqu-of-a-later-release": "1",
    }  # fmt: skip
    entry.rest.calls.clear()
    headers = [f"{name}: {value}" for name, value in forged.items()]
    headers.append(f"authorization: Bearer {signed(entry.keys)}")
    assert await answered(entry, f"POST {CHAT}", *headers) == 200
    assert await answered(entry, f"POST {CHAT}", *headers, body=b'{"model": "secret"}') == 403
    (call,) = entry.rest.calls
    assert call.headers["x-lingqu-client"] == "tester"
    assert call.headers["x-lingqu-model"] == ALLOWED
    assert call.headers["x-lingqu-key"] == "k1"
    assert call.headers.keys().isdisjoint({"x-lingqu-key-models", "x-lingqu-of-a-later-release"})


@pytest.mark.parametrize(
    "header",
    [
        "connection: close, x-lingqu-client, x-lingqu-model",
        "te: x-lingqu-client",
        "x_lingqu_client: root",
        "x-lingqu-client : root",
        "x-lingqu-client\t: root",
        " x-lingqu-client: root",
        "x-lingqu-client:\r\n root",
        "X-LINGQU-CLIENT: root\r\nx-lingqu-client: other",
        "x-http-method-override: GET",
        "x-original-url: /v1/models",
        "x-envoy-original-path: /v1/models",
        "x-forwarded-client-cert: By=root",
    ],
)
async def test_no_header_hides_who_asks(entry: Gate, header: str) -> None:
    entry.rest.calls.clear()
    status = await answered(entry, f"POST {CHAT}", f"authorization: Bearer {signed(entry.keys)}", header)
    if status == 200:
        (call,) = entry.rest.calls
        assert call.path == CHAT
        assert call.headers["x-lingqu-client"] == "tester"
        assert call.headers["x-lingqu-model"] == ALLOWED
        assert "root" not in str(call.headers)
    else:
        assert status in (400, 401)
        assert not entry.rest.calls


# --- Streams ------------------------------------------------------------------------------------------


def framed(message: bytes, flags: int = 0) -> bytes:
    return bytes([flags]) + len(message).to_bytes(4, "big") + message


async def streamed(entry: Gate, first: bytes, pieces: Sequence[bytes], *, wait: bool = True) -> list[bytes]:
    """Send a stream whose first message names the model, and the rest in exactly these pieces; the messages
    that reached Triton's place. `wait`: the rest follows when the first has arrived there."""
    reader, writer = await asyncio.open_connection(*entry.address.split(":"))
    fields = {
        ":method": "POST", ":scheme": "http", ":path": STREAM, ":authority": "x", "te": "trailers",
        "content-type": "application/grpc", "authorization": f"Bearer {signed(entry.keys)}",
    }  # fmt: skip
    block = b"".join(literal(name, value) for name, value in fields.items())
    entry.tensor.calls.clear()
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block))
    writer.write(frame(DATA, 0, 1, framed(first)))
    if wait:
        await until(lambda: entry.tensor.calls and entry.tensor.calls[-1].messages, "it is there", 5, 0.001)
    for piece in pieces:
        writer.write(frame(DATA, 0, 1, piece))
        await writer.drain()
    writer.write(frame(DATA, END_STREAM, 1, b""))
    try:
        async with asyncio.timeout(10):
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                if (head[3] in (HEADERS, 3) and head[4] & END_STREAM) or head[3] == 3:
                    break
    finally:
        writer.close()
    return entry.tensor.calls[-1].messages if entry.tensor.calls else []


def name_of(message: bytes) -> str | None:
    """As Triton reads it; None if it cannot."""
    try:
        return str(oip.ModelInferRequest.FromString(message).model_name)
    except DecodeError:
        return None


fields = st.one_of(
    st.just(field_of(1, ALLOWED.encode())),
    st.just(field_of(1, SECRET.encode())),
    st.just(b"\x8a\x80\x80\x80\x10\x06secret"),
    st.just(field_of(1, b"alonf")),
    st.just(b"\x4b\x4c"),
    st.builds(field_of, st.integers(2, 15), st.binary(max_size=100)),
    st.builds(lambda n: b"\x40" + bytes([n | 128]) * 2 + b"\x01", st.integers(0, 127)),
    st.just(b"\x41" + b"\x0a\x06secre"),
    st.just(b"\x45" + b"\x0a\x06se"),
)
messages = st.one_of(
    st.lists(fields, min_size=1, max_size=6).map(b"".join),
    st.binary(min_size=1, max_size=40),
    st.builds(
        lambda parts, cut: b"".join(parts)[: cut + 1],
        st.lists(fields, min_size=1, max_size=3),
        st.integers(0, 200),
    ),
)


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    at = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(at) if b > a]


@settings(max_examples=60)
@given(
    later=st.lists(messages, min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
    wait=st.booleans(),
)
async def test_no_later_message_of_a_stream_reaches_another_model(
    entry: Gate, later: list[bytes], cuts: list[int], wait: bool
) -> None:
    first = field_of(1, ALLOWED.encode())
    reached = await streamed(entry, first, split(b"".join(map(framed, later)), cuts), wait=wait)
    if not wait and not reached:
        return  # all came together, and Envoy refused it
    suffix = b"\x12\x011" if entry.pinned else b""
    assert len(reached) == len(later) + 1
    for before, after in zip([first, *later], reached, strict=True):
        name = name_of(after)
        assert name in (ALLOWED, "", None) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)
        assert len(after) == len(before) + len(suffix)
        if name_of(before) == ALLOWED and not re.search(rb"secr|alonf", before):
            assert after == before + suffix


async def test_a_compressed_message_of_a_stream_is_no_way_around(entry: Gate) -> None:
    first, rest = field_of(1, ALLOWED.encode()), framed(field_of(1, SECRET.encode()), flags=1)
    for pieces in ([rest], [bytes([byte]) for byte in rest]):
        reached = await streamed(entry, first, pieces)
        assert [name_of(message) for message in reached] == [ALLOWED, "!!!!!!"]


async def test_an_ordinary_stream_passes_as_it_is(entry: Gate) -> None:
    request = oip.ModelInferRequest(model_name=ALLOWED, model_version="1", id="7")
    request.inputs.add(name="x", datatype="INT32", shape=[2])
    request.raw_input_contents.append(bytes(100_000))
    raw = request.SerializeToString()
    async with grpc.aio.insecure_channel(entry.address) as channel:
        stream = channel.stream_stream(STREAM)(metadata=(("authorization", f"Bearer {signed(entry.keys)}"),))
        for _ in range(5):
            await stream.write(raw)
        await stream.done_writing()
        assert len([answer async for answer in stream]) == 5
    assert entry.tensor.calls[-1].messages == [raw] * 5
