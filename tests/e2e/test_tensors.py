"""The Open Inference Protocol through the public port, with an unmodified tritonclient."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

import lingqu
from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from tests.tensors import MODEL, made, pair, version_of


@pytest.fixture
def client(suite: Suite) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(suite.public) as client:
        yield client


@pytest.fixture
def headers(suite: Suite) -> dict[str, str]:
    return {"authorization": f"Bearer {suite.key}"}


def test_vectors_over_the_protocol(
    client: triton.InferenceServerClient, headers: dict[str, str], suite: Suite
) -> None:
    ids, mask = (triton.InferInput(n, [2, 4], "INT64") for n in ("input_ids", "attention_mask"))
    ids.set_data_from_numpy(np.array([[101, 7592, 2088, 102], [101, 7592, 102, 0]]))
    mask.set_data_from_numpy(np.array([[1, 1, 1, 1], [1, 1, 1, 0]]))
    answer = client.infer(VECTOR_MODEL, [ids, mask], headers=headers)
    vectors = answer.as_numpy("embedding")
    assert vectors.shape == (2, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_a_request_the_model_cannot_compute_harms_nobody_elses(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    """All of these share batches with good requests."""

    def embed(**values: Any) -> None:
        inputs = []
        for name, value in values.items():
            inputs.append(triton.InferInput(name, list(np.shape(value)), "INT64"))
            inputs[-1].set_data_from_numpy(np.array(value, np.int64))
        with pytest.raises(InferenceServerException) as caught:
            client.infer(VECTOR_MODEL, inputs, headers=headers)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"

    bad: list[tuple[Any, Any]] = [
        ([[2**63 - 1, 102]], [[1, 1]]),
        ([[-1, 102]], [[1, 1]]),
        ([[30522, 102]], [[1, 1]]),
        (np.ones((1, 257)), np.ones((1, 257))),
        (np.ones((1, 3)), np.ones((1, 9))),
        (np.ones((1, 0)), np.ones((1, 0))),
    ]
    done = asyncio.Event()
    answered: list[int] = []

    async def innocent() -> None:
        async with lingqu.Client(suite.public, suite.key) as own:
            while not done.is_set():
                answered.append(len((await own.embed(VECTOR_MODEL, ["a good text"])).embeddings))

    bystanders = [asyncio.create_task(innocent()) for _ in range(3)]
    for _ in range(5):
        for ids, mask in bad:
            await asyncio.to_thread(embed, input_ids=ids, attention_mask=mask)
    done.set()
    await asyncio.gather(*bystanders)
    assert len(answered) > 10


def test_the_server_and_its_models_describe_themselves(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    assert client.is_server_live(headers=headers)
    assert client.is_server_ready(headers=headers)
    assert client.get_server_metadata(headers=headers).name == "triton"
    assert client.is_model_ready(TEXT_MODEL, headers=headers)
    assert client.get_model_metadata(VECTOR_MODEL, headers=headers).outputs[0].name == "embedding"
    assert client.get_model_config(TEXT_MODEL, headers=headers).config.model_transaction_policy.decoupled
    statistics = client.get_inference_statistics(VECTOR_MODEL, headers=headers)
    assert statistics.model_stats[0].inference_stats.success.count > 0


def test_text_over_the_protocols_stream(
    client: triton.InferenceServerClient, headers: dict[str, str], suite: Suite
) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"The canal joined two rivers and"], dtype=object))
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps({"max_tokens": 12}).encode()], dtype=object))
    client.async_stream_infer(TEXT_MODEL, [text, sampling], enable_empty_final_response=True)
    pieces = []
    while True:
        answer = answers.get(timeout=20)
        assert not isinstance(answer, Exception), answer
        if (piece := answer.as_numpy("text_output")) is not None:
            pieces.append(piece[0].decode())
        if answer.get_response().parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    expected = asyncio.run(_generated(suite, "The canal joined two rivers and", 12))
    assert "".join(pieces) == expected


async def _generated(suite: Suite, prompt: str, tokens: int) -> str:
    async with lingqu.Client(suite.public, suite.key) as client:
        return (await client.generate(TEXT_MODEL, prompt, max_tokens=tokens)).text


def test_bad_sampling_parameters_are_refused(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
    for raw in (b"not json", b'{"max_tokens": 0}', b'{"max_tokens": 100000}', b"\xff"):
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"hello"], dtype=object))
        sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
        sampling.set_data_from_numpy(np.array([raw], dtype=object))
        client.async_stream_infer(TEXT_MODEL, [text, sampling])
        assert isinstance(answers.get(timeout=10), InferenceServerException), raw
    client.stop_stream()


def test_the_session_of_inference_is_not_for_clients(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
    for op in ("open", "submit", "cancel", "stats"):
        command = triton.InferInput("session", [1], "BYTES")
        body = {
            "op": op,
            "id": "x",
            "secret": "guess",
            "key": 1,
            "input_ids": [1],
            "sampling": {"max_tokens": 1},
        }
        command.set_data_from_numpy(np.array([json.dumps(body).encode()], dtype=object))
        client.async_stream_infer(TEXT_MODEL, [command])
        answer = answers.get(timeout=10)
        assert isinstance(answer, InferenceServerException), op
        assert "for the inference service" in str(answer)
    client.stop_stream()


async def test_tritons_own_errors_arrive_unchanged(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    await suite.publish_echo()
    with triton.InferenceServerClient(suite.triton) as direct:
        for inputs in (pair((2,)), pair((1, 2), "FP32"), []):
            errors = []
            for server in (direct, client):
                with pytest.raises(InferenceServerException) as caught:
                    server.infer("echo", inputs, headers=headers)
                errors.append((caught.value.status(), caught.value.message()))
            assert errors[0] == errors[1]
            assert errors[0][0] == "StatusCode.INVALID_ARGUMENT"


def test_an_unknown_model_is_named(client: triton.InferenceServerClient, headers: dict[str, str]) -> None:
    with pytest.raises(InferenceServerException, match='"nope" does not exist') as caught:
        client.infer("nope", pair(), headers=headers)
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize(
    "call",
    [
        lambda c, h: c.unload_model(VECTOR_MODEL, headers=h),
        lambda c, h: c.load_model("x", headers=h),
        lambda c, h: c.get_model_repository_index(headers=h),
        lambda c, h: c.register_system_shared_memory("x", "/x", 8, headers=h),
        lambda c, h: c.update_log_settings({}, headers=h),
    ],
)
def test_what_changes_the_server_is_not_for_clients(
    client: triton.InferenceServerClient, headers: dict[str, str], call: Any
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(client, headers)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_without_a_key_no_tensors_either(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("echo", pair())
    assert caught.value.status() == "StatusCode.UNAUTHENTICATED"


def test_a_message_too_large_to_route_is_refused(suite: Suite, headers: dict[str, str]) -> None:
    with triton.InferenceServerClient(suite.public) as client:
        huge = triton.InferInput("INPUT", [1, 8 << 20], "INT32")
        huge.set_data_from_numpy(np.zeros((1, 8 << 20), np.int32))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("echo", [huge], headers=headers)
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


async def test_large_tensors_pass(suite: Suite, headers: dict[str, str]) -> None:
    await suite.publish_echo()
    values = np.arange(1 << 20, dtype=np.int32).reshape(1, -1)
    tensor = triton.InferInput("INPUT", list(values.shape), "INT32")
    tensor.set_data_from_numpy(values)
    with triton.InferenceServerClient(suite.public) as client:
        answer = await asyncio.to_thread(client.infer, "echo", [tensor], headers=headers)
    assert np.array_equal(answer.as_numpy("OUTPUT"), values)


async def test_an_answer_may_take_longer_than_a_proxy_waits_by_default(
    suite: Suite, client: triton.InferenceServerClient, headers: dict[str, str], tmp_path: Path
) -> None:
    """Envoy gives up after 15 s unless it is told otherwise."""
    body = MODEL.format(version=1).replace(
        "        tensor", "        import time; time.sleep(16)\n        tensor"
    )
    await suite.publish("slow", made(tmp_path, 1, body).folder)
    answer = await asyncio.to_thread(client.infer, "slow", pair(), headers=headers)
    assert version_of(answer) == 1
