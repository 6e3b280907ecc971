"""Embed through the public port against the checkpoint in torch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest

import lingqu
from bench.suite import Suite
from pipeline.bundled import VECTOR_MODEL
from services.inference.artifact import Manifest

TEXTS = [
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "灵渠沟通了湘江和漓江。",
    "👩‍👩‍👧‍👦 שלום",
    "long " * 400,
    "\x00\u200b",
]


async def test_vectors_are_the_checkpoints(suite: Suite, artifacts: dict[str, Path]) -> None:
    """Golden vectors come from torch; a batch of different lengths gives each the same as alone."""
    golden = Manifest.read(artifacts[VECTOR_MODEL]).golden_vectors
    async with lingqu.Client(suite.public, suite.key) as client:
        answer = await client.embed(VECTOR_MODEL, [g.text for g in golden])
        for expected, found in zip(golden, answer.embeddings, strict=True):
            assert float(np.dot(expected.vector, found.values)) > 0.9999
        together = await client.embed(VECTOR_MODEL, TEXTS)
        alone = await asyncio.gather(*(client.embed(VECTOR_MODEL, [text]) for text in TEXTS))
    for one, whole in zip(alone, together.embeddings, strict=True):
        assert float(np.dot(one.embeddings[0].values, whole.values)) > 0.9999
        assert abs(np.linalg.norm(whole.values) - 1) < 1e-4
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)


async def test_more_texts_than_a_batch_keep_their_order(suite: Suite) -> None:
    texts = [f"{'word ' * (n % 17)}number {n}" for n in range(300)]
    async with lingqu.Client(suite.public, suite.key) as client:
        many = await client.embed(VECTOR_MODEL, texts)
        for n in (0, 7, 150, 299):
            (one,) = (await client.embed(VECTOR_MODEL, [texts[n]])).embeddings
            assert float(np.dot(one.values, many.embeddings[n].values)) > 0.9999


async def test_long_texts_are_computed_in_several_runs(suite: Suite) -> None:
    """Twenty of 256 tokens are more than one run of the graph takes."""
    texts = [f"number {n} " + "long " * 300 for n in range(20)]
    async with lingqu.Client(suite.public, suite.key) as client:
        many = await client.embed(VECTOR_MODEL, texts)
        for n in (0, 19):
            (one,) = (await client.embed(VECTOR_MODEL, [texts[n]])).embeddings
            assert float(np.dot(one.values, many.embeddings[n].values)) > 0.9999


@pytest.mark.parametrize(
    ("inputs", "field"), [([], "inputs"), (["ok", ""], "inputs[1]"), (["x"] * 2049, "inputs")]
)
async def test_bad_inputs_name_their_field(suite: Suite, inputs: list[str], field: str) -> None:
    async with lingqu.Client(suite.public, suite.key) as client:
        with pytest.raises(lingqu.LingquError) as caught:
            await client.embed(VECTOR_MODEL, inputs)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
