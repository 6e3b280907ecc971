"""A classifier as this service serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.core.discovery import VersionKey
from services.inference.artifact import ClassifierSpec
from services.inference.callers import Priority
from services.inference.encoder import CACHE_BYTES, Budget, Encoder, Truncation
from services.inference.triton import Triton


@dataclass(frozen=True, slots=True)
class Classes:
    """FP32 [texts, labels]: the probability of each label, in the model's order; and how many tokens were
    read."""

    scores: npt.NDArray[np.float32]
    tokens: int


class ClassifierModel(Encoder):
    """One version of a classifier in one Triton. `labels` are its names of them, in its order;
    `multi_label`: a text may have several."""

    def __init__(
        self,
        key: VersionKey,
        spec: ClassifierSpec,
        folder: Path,
        triton: Triton,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(key, spec, folder, triton, cache_bytes)
        self.labels = spec.labels
        self.multi_label = spec.multi_label

    async def classify(
        self,
        texts: Sequence[str],
        timeout: float | None = None,
        *,
        truncation: Truncation = Truncation.END,
        priority: Priority = Priority.NORMAL,
    ) -> Classes:
        """In the order of `texts`. Raises InvalidInput and what Triton.infer raises."""
        budget = Budget.of(timeout, priority)
        encoded = await self.encode(texts, truncation)
        logits = await self.cached(encoded, "logits", budget)
        return Classes(probabilities(logits, self.multi_label), sum(map(len, encoded)))


def probabilities(logits: npt.NDArray[np.float32], multi_label: bool) -> npt.NDArray[np.float32]:
    """Sigmoid of each logit, or softmax over the last axis; neither overflows."""
    if multi_label:
        scores = np.exp(-np.logaddexp(0, -logits))
    else:
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = shifted / shifted.sum(axis=-1, keepdims=True)
    return np.asarray(scores, np.float32)
