"""A vector model as this service serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.core.discovery import VersionKey
from services.core.errors import InvalidInput
from services.inference.artifact import VectorSpec
from services.inference.callers import Priority
from services.inference.encoder import CACHE_BYTES, Budget, Encoder, Truncation
from services.inference.triton import Triton

# Shorter vectors are taken for zero: there is no direction to keep.
SHORTEST = 1e-12


@dataclass(frozen=True, slots=True)
class Vectors:
    """FP32 [texts, dimensions], and how many tokens were read."""

    values: npt.NDArray[np.float32]
    tokens: int


class VectorModel(Encoder):
    """One version of a vector model in one Triton."""

    def __init__(
        self, key: VersionKey, spec: VectorSpec, folder: Path, triton: Triton, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__(key, spec, folder, triton, cache_bytes)
        self._dimensions = spec.dimensions
        self._normalized = spec.normalized

    async def embed(
        self,
        texts: Sequence[str],
        timeout: float | None = None,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: Truncation = Truncation.END,
        priority: Priority = Priority.NORMAL,
    ) -> Vectors:
        """Vectors in the order of `texts`. `dimensions`: only so many components, None for all; `normalize`:
        whether they are brought to unit length after that, None for what the model does. Raises InvalidInput
        and what Triton.infer raises."""
        self._check(dimensions)
        budget = Budget.of(timeout, priority)
        encoded = await self.encode(texts, truncation)
        return await self._embed(encoded, budget, dimensions, normalize)

    async def embed_tokens(
        self,
        rows: Sequence[Sequence[int]],
        timeout: float | None = None,
        *,
        dimensions: int | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> Vectors:
        """The same for texts that are token ids already. Raises InvalidInput for ids that no token has and
        for more of them than the model reads: what is cut off may have been the end of the text."""
        self._check(dimensions)
        for at, row in enumerate(rows):
            if len(row) > self._max_tokens:
                raise InvalidInput(
                    f"inputs[{at}]", f"{len(row)} tokens, but the model reads {self._max_tokens}"
                )
            if max(row) >= (size := self._whole.get_vocab_size()):
                raise InvalidInput(
                    f"inputs[{at}]", f"a token id is not below {size}, the size of the vocabulary"
                )
        return await self._embed(rows, Budget.of(timeout, priority), dimensions, None)

    def _check(self, dimensions: int | None) -> None:
        if dimensions is not None and not 1 <= dimensions <= self._dimensions:
            raise InvalidInput(
                "dimensions", f"{dimensions}, but {self.key.model} has 1 to {self._dimensions}"
            )

    async def _embed(
        self,
        encoded: Sequence[Sequence[int]],
        budget: Budget,
        dimensions: int | None,
        normalize: bool | None,
    ) -> Vectors:
        values = await self.cached(encoded, "embedding", budget)
        return Vectors(shaped(values, dimensions, normalize, self._normalized), sum(map(len, encoded)))


def shaped(
    values: npt.NDArray[np.float32], dimensions: int | None, normalize: bool | None, normalized: bool
) -> npt.NDArray[np.float32]:
    """The first `dimensions` components, brought to unit length if wanted; `normalized`: the model's own
    vectors have it, so that only what was cut has to be brought to it again."""
    if dimensions is not None:
        values = values[:, :dimensions]
    if normalize is None:
        normalize = normalized and dimensions is not None
    if not normalize:
        return values
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, np.maximum(norms, np.float32(SHORTEST)), dtype=np.float32)
