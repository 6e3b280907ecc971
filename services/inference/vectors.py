"""A vector model as this service serves it: tokenise, pad, embed in Triton."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from services.core.discovery import VersionKey
from services.core.errors import InvalidInput
from services.core.telemetry import current_traceparent
from services.inference.artifact import VectorSpec
from services.inference.repository import MAX_BATCH
from services.inference.tokens import unblocked
from services.inference.triton import Triton


@dataclass(frozen=True, slots=True)
class Vectors:
    """FP32 [texts, dimensions], and how many tokens were read."""

    values: npt.NDArray[np.float32]
    tokens: int


class VectorModel:
    """One version of a vector model in one Triton."""

    def __init__(self, key: VersionKey, spec: VectorSpec, folder: Path, triton: Triton) -> None:
        self.key = key
        self._triton = triton
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._max_tokens = spec.max_tokens
        self._tokenizer.enable_truncation(spec.max_tokens)
        self._tokenizer.no_padding()

    async def close(self) -> None:
        """Holds nothing open."""

    async def embed(self, texts: Sequence[str], timeout: float | None = None) -> Vectors:
        """Vectors in the order of `texts`. Texts of similar length share a request, so that little is
        padded; Triton batches the requests of all callers. Raises what Triton.infer raises."""
        encodings = await unblocked(
            sum(map(len, texts)), lambda: self._tokenizer.encode_batch_fast(list(texts))
        )
        return await self._embed([e.ids for e in encodings], timeout)

    async def embed_tokens(self, rows: Sequence[Sequence[int]], timeout: float | None = None) -> Vectors:
        """The same for texts that are token ids already. Raises InvalidInput for ids that no token has and
        for more of them than the model reads: what is cut off may have been the end of the text."""
        size = self._tokenizer.get_vocab_size()
        for at, row in enumerate(rows):
            if len(row) > self._max_tokens:
                raise InvalidInput(
                    f"inputs[{at}]", f"{len(row)} tokens, but the model reads {self._max_tokens}"
                )
            if max(row) >= size:
                raise InvalidInput(
                    f"inputs[{at}]", f"a token id is not below {size}, the size of the vocabulary"
                )
        return await self._embed(rows, timeout)

    async def _embed(self, encoded: Sequence[Sequence[int]], timeout: float | None) -> Vectors:
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        chunks = [order[i : i + MAX_BATCH] for i in range(0, len(order), MAX_BATCH)]
        traceparent = current_traceparent()
        runs = [
            asyncio.ensure_future(self._run([encoded[i] for i in chunk], traceparent, timeout))
            for chunk in chunks
        ]
        try:  # no TaskGroup: it would wrap the error that callers are to see
            parts = await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
        values = np.empty((len(encoded), parts[0].shape[1]), np.float32)
        for chunk, part in zip(chunks, parts, strict=True):
            values[chunk] = part
        return Vectors(values, sum(map(len, encoded)))

    async def _run(
        self, rows: Sequence[Sequence[int]], traceparent: str, timeout: float | None
    ) -> npt.NDArray[np.float32]:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        return await self._triton.infer(self.key, inputs, "embedding", traceparent, timeout)
