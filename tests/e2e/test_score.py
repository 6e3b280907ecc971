"""Likelihoods are the reference implementation's, whoever else is served meanwhile."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator
from contextlib import redirect_stderr
from typing import Any

import grpc
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import lingqu
from bench.suite import Suite
from lingqu.client import channel_options
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceStub
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL, shipped_gguf

TEXTS = (
    "The canal joined two rivers.",
    "Ein Kanal verbindet zwei Flüsse. 運河 🚣",
    "Paris is the capital of France. " * 30,
)


@pytest.fixture
async def stub(suite: Suite) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(suite.public, options=channel_options(suite.public)) as channel:
        yield InferenceServiceStub(channel)


@pytest.fixture
def metadata(suite: Suite) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {suite.key}"),)


@pytest.fixture(scope="module")
def reference() -> Any:
    gguf = shipped_gguf()
    with redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        ).eval()


def expected(model: Any, ids: list[int]) -> list[float]:
    with torch.inference_mode():
        logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return [float(logits[at - 1, token]) for at, token in enumerate(ids) if at]


async def test_scores_are_the_references(
    suite: Suite, stub: Any, metadata: Any, reference: Any, tokenizer: Tokenizer
) -> None:
    async with lingqu.Client(suite.public, suite.key) as client:
        busy = asyncio.create_task(client.generate(TEXT_MODEL, "Once upon a time", max_tokens=64))
        request = pb.ScoreRequest(model=TEXT_MODEL, inputs=TEXTS, tokens=True)
        answer = await stub.Score(request, metadata=metadata, timeout=60)
        await busy
    for text, score in zip(TEXTS, answer.scores, strict=True):
        ids = tokenizer.encode(text).ids
        wanted = expected(reference, ids)
        assert [one.token_id for one in score.tokens] == ids[1:]
        assert [one.logprob for one in score.tokens] == pytest.approx(wanted, abs=0.02)
        assert score.log_likelihood == pytest.approx(sum(wanted), abs=0.5)
        assert score.perplexity == pytest.approx(math.exp(-sum(wanted) / len(wanted)), rel=0.02)
        assert score.scored_tokens == len(ids) - 1
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(text).ids) for text in TEXTS)


async def test_a_prefix_is_read_and_not_scored(stub: Any, metadata: Any, tokenizer: Tokenizer) -> None:
    whole = pb.ScoreRequest(model=TEXT_MODEL, inputs=["The capital of France is Paris."], tokens=True)
    whole_score = (await stub.Score(whole, metadata=metadata, timeout=30)).scores[0]
    split = pb.ScoreRequest(model=TEXT_MODEL, prefix="The capital of France is", inputs=[" Paris.", " Rome."])
    paris, rome = (await stub.Score(split, metadata=metadata, timeout=30)).scores
    assert paris.log_likelihood == pytest.approx(
        sum(one.logprob for one in whole_score.tokens[-2:]), abs=0.01
    )
    assert paris.scored_tokens == 2
    assert paris.log_likelihood > rome.log_likelihood
    assert not paris.tokens


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [""]}, "inputs[0]"),
        ({"inputs": ["fine", "word " * 9000]}, "inputs[1]"),
        ({"inputs": ["a"] * 257}, "inputs"),
        ({"inputs": ["a"], "prefix": "x" * (1 << 20) + "x"}, "prefix"),
        ({"inputs": ["a"], "model": VECTOR_MODEL}, "model"),
    ],
)
async def test_what_cannot_be_scored_is_named(
    suite: Suite, stub: Any, metadata: Any, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(pb.ScoreRequest(**{"model": TEXT_MODEL, **fields}), metadata=metadata, timeout=30)
    error = lingqu.LingquError(caught.value)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_one_token_has_nothing_to_be_predicted_by(stub: Any, metadata: Any) -> None:
    answer = await stub.Score(pb.ScoreRequest(model=TEXT_MODEL, inputs=["a"]), metadata=metadata, timeout=30)
    assert (answer.scores[0].scored_tokens, answer.scores[0].perplexity) == (0, 0.0)
