"""Our own API as JSON, gRPC-Web and CORS through a real Envoy, in front of a server that checks requests as
inference does."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx2 as httpx
import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.access import RATES, Access, Client, Limits
from services.core.errors import BackendUnavailable
from services.gateway.filters.web import MAX_ANSWER_BYTES
from services.inference import convert, convert_tasks
from services.inference.rest.document import document
from tests import gateways
from tests.gateways import AWAY, TENSOR, TEXT, Backend, Gateway

PAGE = "https://app.example"
PAGES = (PAGE, "https://*.lab.example")
LIMITS = Limits(requests_per_minute=1, local=RATES)
ACCESS = Access((Client("tester", ("*",)), Client("guest", (TENSOR,)), Client("hasty", ("*",), LIMITS)))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Checking(Backend):
    """Every RPC, with the checks of inference and answers that have all of their fields."""

    async def Generate(self, request: Any, context: Any) -> Any:
        convert.to_generate_job(request)
        return await super().Generate(request, context)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        convert.to_generate_job(request)
        async for chunk in super().StreamGenerate(request, context):
            yield chunk

    async def Embed(self, request: Any, context: Any) -> Any:
        convert.to_texts(request)
        convert_tasks.to_shape(request)
        return await super().Embed(request, context)

    async def Classify(self, request: Any, context: Any) -> Any:
        convert.to_texts(request)
        convert_tasks.to_top(request)
        label = pb.Label(name="canal", score=0.25)
        return pb.ClassifyResponse(results=[pb.Classification(labels=[label])], model_version="1")

    async def Answer(self, request: Any, context: Any) -> Any:
        convert_tasks.to_question(request)
        return pb.AnswerResponse(answers=[pb.Span(text="1", start=0, end=1, score=0.5)], model_version="1")

    async def Score(self, request: Any, context: Any) -> Any:
        convert.to_score_texts(request)
        logprob = pb.TokenLogprob(token_id=7, bytes=b"\xff", logprob=-0.5)
        score = pb.TextScore(log_likelihood=-0.5, scored_tokens=1, perplexity=1.6, tokens=[logprob])
        return pb.ScoreResponse(scores=[score], usage=pb.Usage(prompt_tokens=1), model_version="1")

    async def Tokenize(self, request: Any, context: Any) -> Any:
        convert_tasks.to_tokenize_text(request) if request.text else convert.turns(request.messages)
        return pb.TokenizeResponse(model_version="1")


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder = tmp_path_factory.mktemp("own-rest")
    async with gateways.running(folder, Checking(), access=ACCESS, cors_origins=PAGES) as gateway:
        gateway.backend.hold.set()
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    address, headers = f"http://{gateway.address}", dict(gateway.metadata)
    async with httpx.AsyncClient(base_url=address, headers=headers, trust_env=False, timeout=20) as client:
        yield client
    gateway.backend.error = None


def check_status(answer: httpx.Response, http: int, code: grpc.StatusCode, reason: str) -> dict[str, Any]:
    """Checks the google.rpc.Status of an answer and returns its details by type."""
    assert answer.status_code == http
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["code"] == code.value[0]
    assert body["message"]
    details = {detail["@type"].rpartition(".")[2]: detail for detail in body["details"]}
    assert (details["ErrorInfo"]["reason"], details["ErrorInfo"]["domain"]) == (reason, "lingqu")
    return details


async def test_a_call_is_the_rpc(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.backend.asked.clear()
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "seed": "7",
        "priority": "PRIORITY_BATCH",
    }
    answer = await client.post(f"/v1/models/{TEXT}:generate", json={**body, "top_p": 0.5})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["finish_reason"], told["model_version"]) == ("FINISH_REASON_STOP", "1")
    ((request, headers),) = gateway.backend.asked
    assert (request.model, request.max_tokens, request.seed, request.top_p) == (TEXT, 3, 7, 0.5)
    assert request.messages[0].content == "hi"
    assert headers["x-lingqu-client"] == "tester"
    assert headers["x-lingqu-model-version"] == "1"
    assert "authorization" not in headers


async def test_a_version_may_be_asked_for(client: httpx.AsyncClient) -> None:
    assert (await client.post(f"/v1/models/{TEXT}@1:generate", json={"prompt": "x"})).status_code == 200
    refused = await client.post(f"/v1/models/{TEXT}@9:generate", json={"prompt": "x"})
    check_status(refused, 404, grpc.StatusCode.NOT_FOUND, "VERSION_NOT_SERVED")


async def test_a_stream_is_events_that_come_one_by_one(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.backend.hold.clear()
    path = f"/v1/models/{TEXT}:streamGenerate"
    async with client.stream("POST", path, json={"prompt": "one two three"}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        chunks = []
        async for line in answer.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            chunks.append(json.loads(line.removeprefix("data: ")))
            gateway.backend.hold.set()  # or no second one would come
    assert [chunk["text"] for chunk in chunks] == ["one", "two", "three"]
    assert [chunk["finish_reason"] for chunk in chunks][-1] == "FINISH_REASON_STOP"


async def test_errors_of_backends_keep_their_details(gateway: Gateway, client: httpx.AsyncClient) -> None:
    for verb in ("generate", "streamGenerate"):
        answer = await client.post(f"/v1/models/{TEXT}:{verb}", json={"prompt": "x", "max_tokens": -1})
        details = check_status(answer, 400, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        assert details["BadRequest"]["field_violations"][0]["field"] == "max_tokens"
    gateway.backend.error = BackendUnavailable("the engine was lost 100 %")
    answer = await client.post(f"/v1/models/{TEXT}:generate", json={"prompt": "x"})
    details = check_status(answer, 503, grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")
    assert details["RetryInfo"]["retry_delay"] == "1s"


@pytest.mark.parametrize(
    ("path", "body", "http", "reason"),
    [
        ("nosuch:generate", {"prompt": "x"}, 404, "MODEL_NOT_FOUND"),
        (f"{TENSOR}:generate", {"prompt": "x"}, 404, "MODEL_NOT_FOUND"),
        (f"{TEXT}:nosuch", {"prompt": "x"}, 404, "NOT_FOUND"),
        (TEXT, {"prompt": "x"}, 404, "NOT_FOUND"),
        (f"{TEXT}/versions/1:generate", {"prompt": "x"}, 404, "NOT_FOUND"),
        (f"{TEXT}%2f..%2f{TEXT}:generate", {"prompt": "x"}, 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate", {"prompt": 7}, 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate", b"{", 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate", b"[]", 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate", b'{"prompt": "\xff"}', 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate", b'{"a":' * 100_000, 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate", {"model": TENSOR, "prompt": "x"}, 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate?nosuch=1", {"prompt": "x"}, 400, "INVALID_ARGUMENT"),
        (f"{TEXT}:generate?model={TENSOR}", {"prompt": "x"}, 404, "MODEL_NOT_FOUND"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
async def test_what_envoy_refuses_looks_the_same(
    client: httpx.AsyncClient, path: str, body: Any, http: int, reason: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    code = grpc.StatusCode.NOT_FOUND if http == 404 else grpc.StatusCode.INVALID_ARGUMENT
    check_status(await client.post(f"/v1/models/{path}", content=content), http, code, reason)


async def test_keys_are_asked_for(gateway: Gateway, client: httpx.AsyncClient) -> None:
    for key in ("", "Bearer nonsense"):
        refused = await client.post(
            f"/v1/models/{TEXT}:generate", json={"prompt": "x"}, headers={"authorization": key}
        )
        check_status(refused, 401, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_policies_hold_here_too(gateway: Gateway, client: httpx.AsyncClient) -> None:
    async def ask(who: str, model: str = TEXT) -> httpx.Response:
        key = {"authorization": f"Bearer {gateway.keys.mint(who).key}"}
        return await client.post(f"/v1/models/{model}:generate", json={"prompt": "x"}, headers=key)

    check_status(await ask("guest"), 403, grpc.StatusCode.PERMISSION_DENIED, "MODEL_NOT_ALLOWED")
    assert (await ask("hasty")).status_code == 200
    refused = await ask("hasty")
    check_status(refused, 429, grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert refused.headers["retry-after"] == "60"
    check_status(await ask("tester", AWAY), 503, grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")


async def test_large_requests_and_answers(client: httpx.AsyncClient) -> None:
    large = {"prompt": "x" * 1_000_000, "top_k": 8}
    answer = await client.post(f"/v1/models/{TEXT}:generate", json=large)
    assert len(answer.json()["text"]) == 8_000_000
    much = {"prompt": "x" * (2 * MAX_ANSWER_BYTES)}
    too_large = await client.post(f"/v1/models/{TEXT}:generate", json=much)
    check_status(too_large, 413, grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


async def test_the_document_is_true(gateway: Gateway) -> None:
    schema = schemathesis.openapi.from_dict(orjson.loads(document()))
    schema = schema.include(path_regex="[}]:")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 7

    def check(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(
            max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        def conforms(case: Any) -> None:
            case.path_parameters["model"] = TEXT
            case.call_and_validate(
                base_url=f"http://{gateway.address}", checks=CHECKS, headers=dict(gateway.metadata)
            )

        conforms()

    for operation in operations:
        await asyncio.to_thread(check, operation)


# Browsers.


def framed(message: Any) -> bytes:
    body = message.SerializeToString()
    return struct.pack(">BI", 0, len(body)) + body


def frames(raw: bytes) -> list[tuple[int, bytes]]:
    found = []
    while raw:
        flags, length = struct.unpack(">BI", raw[:5])
        found.append((flags, raw[5 : 5 + length]))
        raw = raw[5 + length :]
    return found


@pytest.mark.parametrize("kind", ["application/grpc-web+proto", "application/grpc-web-text+proto"])
async def test_grpc_web(client: httpx.AsyncClient, kind: str) -> None:
    async def call(method: str, request: Any) -> tuple[list[bytes], dict[str, str]]:
        text = "text" in kind
        content = base64.b64encode(framed(request)) if text else framed(request)
        headers = {"content-type": kind, "accept": kind, "x-grpc-web": "1"}
        path = f"/lingqu.inference.v1.InferenceService/{method}"
        answer = await client.post(path, content=content, headers=headers)
        assert answer.status_code == 200
        raw = answer.content
        if text:  # each piece is padded by itself
            raw = b"".join(base64.b64decode(raw[at : at + 4]) for at in range(0, len(raw), 4))
        found = frames(raw)
        trailers = b"".join(body for flags, body in found if flags & 0x80).decode()
        told = dict(line.split(":", 1) for line in trailers.split("\r\n") if line) or dict(answer.headers)
        return [body for flags, body in found if not flags & 0x80], told

    (body,), trailers = await call("Generate", pb.GenerateRequest(model=TEXT, prompt="from a page"))
    assert pb.GenerateResponse.FromString(body).text == "from a page"
    assert trailers["grpc-status"] == "0"
    bodies, trailers = await call("StreamGenerate", pb.GenerateRequest(model=TEXT, prompt="a b c"))
    assert [pb.GenerateChunk.FromString(body).text for body in bodies] == ["a", "b", "c"]
    bodies, trailers = await call("Generate", pb.GenerateRequest(model="nosuch", prompt="x"))
    assert (bodies, trailers["grpc-status"]) == ([], "5")


@pytest.mark.parametrize("origin", [PAGE, "https://a.lab.example"])
@pytest.mark.parametrize(
    "path",
    [f"/v1/models/{TEXT}:generate", "/v1/chat/completions", "/lingqu.inference.v1.InferenceService/Embed"],
)
async def test_pages_that_may_call_are_told_so_without_a_key(
    gateway: Gateway, origin: str, path: str
) -> None:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    async with httpx.AsyncClient(trust_env=False) as stranger:
        answer = await stranger.options(f"http://{gateway.address}{path}", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "authorization" in answer.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.evil", "https://a/.lab.example", "null"]
)
async def test_other_pages_are_not(gateway: Gateway, client: httpx.AsyncClient, origin: str) -> None:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    async with httpx.AsyncClient(trust_env=False) as stranger:
        answer = await stranger.options(f"http://{gateway.address}/v1/models/{TEXT}:generate", headers=asked)
    assert answer.status_code == 401
    answer = await client.post(
        f"/v1/models/{TEXT}:generate", json={"prompt": "x"}, headers={"origin": origin}
    )
    assert "access-control-allow-origin" not in answer.headers
