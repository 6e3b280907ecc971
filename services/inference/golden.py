"""The proof a version gives before it takes traffic: its golden examples, computed here and now."""

from __future__ import annotations

import asyncio

import numpy as np

from services.inference import latency
from services.inference.artifact import GoldenText, LatencyBudget, Manifest
from services.inference.backends.jobs import Sampling
from services.inference.classifier import ClassifierModel
from services.inference.questions import AnswerModel, Question
from services.inference.text import TextModel
from services.inference.vectors import VectorModel

MIN_COSINE = 0.9999
MAX_SCORE_DIFFERENCE = 1e-3
TIMEOUT_S = 60.0


class GoldenMismatch(Exception):
    """The model answers, but not what it answered when it was published."""


class TooSlow(GoldenMismatch):
    """It answers as it should, but not within its latency budget."""


async def check_text(model: TextModel, manifest: Manifest) -> None:
    """Greedy tokens are exactly the golden ones, and in time. Raises GoldenMismatch."""
    for golden in manifest.golden_texts:
        await _check_text(model, golden)
    if manifest.text is not None and manifest.text.guesses:  # in company another runtime computes them
        await asyncio.gather(*(_check_text(model, golden) for golden in manifest.golden_texts))
    if manifest.golden_texts and manifest.latency_budget != LatencyBudget():
        longest = max(manifest.golden_texts, key=lambda golden: len(golden.token_ids))
        _in_time(await latency.of_text(model, longest), manifest.latency_budget)


async def _check_text(model: TextModel, golden: GoldenText) -> None:
    tokens: list[int] = []
    async for step in model.session.generate(
        list(golden.prompt_ids), Sampling(max_tokens=len(golden.token_ids))
    ):
        tokens += step.tokens
    if tuple(tokens) != golden.token_ids:
        pairs = zip(tokens, golden.token_ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
        raise GoldenMismatch(f'golden example "{golden.prompt[:60]}": token {at + 1} differs')


async def check_vectors(model: VectorModel, manifest: Manifest) -> None:
    """Cosine similarity with each golden vector is at least MIN_COSINE, in time. Raises GoldenMismatch."""
    texts = [golden.text for golden in manifest.golden_vectors]
    if not texts:
        return
    found = (await model.embed(texts, TIMEOUT_S)).values
    for golden, vector in zip(manifest.golden_vectors, found, strict=True):
        expected = np.array(golden.vector, np.float32)
        cosine = float(vector @ expected / (np.linalg.norm(vector) * np.linalg.norm(expected)))
        if not cosine >= MIN_COSINE:
            raise GoldenMismatch(
                f'golden example "{golden.text[:60]}": cosine {cosine:.6f} is below {MIN_COSINE}'
            )
    if manifest.latency_budget != LatencyBudget():
        found_ms = await latency.of_requests(lambda t: model.embed([t], TIMEOUT_S), max(texts, key=len))
        _in_time(found_ms, manifest.latency_budget)


def _in_time(found: latency.Latency, budget: LatencyBudget) -> None:
    """Raises TooSlow."""
    if (over := latency.exceeded(found, budget)) is not None:
        raise TooSlow(f"too slow on this replica: {over} (its latency budget)")


async def check_labels(model: ClassifierModel, manifest: Manifest) -> None:
    """The best label of each text is the golden one, and no label's probability differs by more than
    MAX_SCORE_DIFFERENCE. Raises GoldenMismatch."""
    texts = [golden.text for golden in manifest.golden_labels]
    if not texts:
        return
    found = (await model.classify(texts, TIMEOUT_S)).scores
    for golden, scores in zip(manifest.golden_labels, found, strict=True):
        expected = np.array(golden.scores, np.float32)
        name = f'golden example "{golden.text[:60]}"'
        if len(expected) != len(scores):
            raise GoldenMismatch(f"{name}: {len(scores)} labels, not {len(expected)}")
        if int(scores.argmax()) != int(expected.argmax()):
            best, wanted = model.labels[int(scores.argmax())], model.labels[int(expected.argmax())]
            raise GoldenMismatch(f'{name}: label "{best}", not "{wanted}"')
        difference = float(np.abs(scores - expected).max())
        if not difference <= MAX_SCORE_DIFFERENCE:
            raise GoldenMismatch(f"{name}: a score differs by {difference:.6f}")
    if manifest.latency_budget != LatencyBudget():
        found_ms = await latency.of_requests(lambda t: model.classify([t], TIMEOUT_S), max(texts, key=len))
        _in_time(found_ms, manifest.latency_budget)


async def check_answers(model: AnswerModel, manifest: Manifest) -> None:
    """The best answer of each question is the golden one, to MAX_SCORE_DIFFERENCE as probable. Raises
    GoldenMismatch."""
    for golden in manifest.golden_answers:
        job = Question(golden.question, golden.context)
        spans = (await model.answer(job, TIMEOUT_S)).spans
        start, end, score = (spans[0].start, spans[0].end, spans[0].score) if spans else (0, 0, 0.0)
        name = f'golden example "{golden.question[:60]}"'
        if (start, end) != (golden.start, golden.end):
            raise GoldenMismatch(f"{name}: answer at {start}:{end}, not {golden.start}:{golden.end}")
        if not abs(score - golden.score) <= MAX_SCORE_DIFFERENCE:
            raise GoldenMismatch(f"{name}: score {score:.6f}, not {golden.score:.6f}")
    if manifest.latency_budget != LatencyBudget() and manifest.golden_answers:
        longest = max(manifest.golden_answers, key=lambda golden: len(golden.context))
        found_ms = await latency.of_requests(
            lambda question: model.answer(Question(question, longest.context), TIMEOUT_S), longest.question
        )
        _in_time(found_ms, manifest.latency_budget)
