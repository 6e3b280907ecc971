"""The proof a version gives before it takes traffic: its golden examples, computed here and now."""

from __future__ import annotations

import numpy as np

from services.inference import latency
from services.inference.artifact import LatencyBudget, Manifest
from services.inference.backends.engine import Sampling
from services.inference.text import TextModel
from services.inference.vectors import VectorModel

MIN_COSINE = 0.9999
TIMEOUT_S = 60.0


class GoldenMismatch(Exception):
    """The model answers, but not what it answered when it was published."""


class TooSlow(GoldenMismatch):
    """It answers as it should, but not within its latency budget."""


async def check_text(model: TextModel, manifest: Manifest) -> None:
    """Greedy tokens are exactly the golden ones, and in time. Raises GoldenMismatch."""
    for golden in manifest.golden_texts:
        sampling = Sampling(max_tokens=len(golden.token_ids))
        tokens: list[int] = []
        async for step in model.session.generate(list(golden.prompt_ids), sampling):
            tokens += step.tokens
        if tuple(tokens) != golden.token_ids:
            at = next(
                (i for i, (a, b) in enumerate(zip(tokens, golden.token_ids, strict=False)) if a != b),
                len(tokens),
            )
            raise GoldenMismatch(f'golden example "{golden.prompt[:60]}": token {at + 1} differs')
    if manifest.golden_texts and manifest.latency_budget != LatencyBudget():
        longest = max(manifest.golden_texts, key=lambda golden: len(golden.token_ids))
        _in_time(await latency.of_text(model, longest), manifest.latency_budget)


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
        longest = max(texts, key=len)
        _in_time(await latency.of_vectors(model, longest, TIMEOUT_S), manifest.latency_budget)


def _in_time(found: latency.Latency, budget: LatencyBudget) -> None:
    """Raises TooSlow."""
    if (over := latency.exceeded(found, budget)) is not None:
        raise TooSlow(f"too slow on this replica: {over} (its latency budget)")
