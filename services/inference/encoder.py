"""What all encoders share, whatever they answer: tokenise, batch, run in Triton."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from services.core.discovery import VersionKey
from services.core.errors import DeadlinePassed, InvalidInput
from services.core.telemetry import current_traceparent
from services.inference.artifact import EncoderSpec
from services.inference.backends.runs import runs
from services.inference.callers import Priority
from services.inference.repository import MAX_BATCH
from services.inference.rows import RowCache
from services.inference.tokens import Tokens, unblocked
from services.inference.triton import Triton

Values = npt.NDArray[np.float32]
CACHE_BYTES = 32 << 20
# Requests that one call has in Triton at once: enough to keep it busy, and others' requests come between.
IN_FLIGHT = 2


class Truncation(Enum):
    """What becomes of texts longer than the model reads: the end or the start of them is read, or nothing."""

    END = "right"  # what is cut off, as tokenizers call it
    START = "left"
    REFUSE = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a call may take, and its place in Triton's queue. `deadline` is a time of time.monotonic()."""

    deadline: float | None = None
    priority: Priority = Priority.NORMAL

    @classmethod
    def of(cls, timeout: float | None, priority: Priority) -> Budget:
        return cls(None if timeout is None else time.monotonic() + timeout, priority)

    def left(self) -> float | None:
        """Seconds. Raises DeadlinePassed if there are none."""
        if self.deadline is None:
            return None
        if (left := self.deadline - time.monotonic()) <= 0:
            raise DeadlinePassed("the deadline passed before the answer was complete")
        return left


@dataclass(frozen=True, slots=True)
class Row:
    """A text, or a question with a piece of context, as the graph reads it. `types` are 0 for the question
    and 1 for the context, for graphs that take them."""

    ids: Sequence[int]
    types: Sequence[int] = ()


class Encoder:
    """One version of an encoder in one Triton."""

    def __init__(
        self,
        key: VersionKey,
        spec: EncoderSpec,
        folder: Path,
        triton: Triton,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.key = key
        self.cache = RowCache(cache_bytes)
        self._max_tokens = spec.max_tokens
        self._inputs = spec.inputs
        self._outputs = spec.outputs
        self._triton = triton
        self._whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._whole.no_truncation()
        self._whole.no_padding()
        self._cutting: dict[Truncation, Tokenizer] = {}

    async def close(self) -> None:
        """Holds nothing open."""

    async def tokenize(self, text: str) -> Tokens:
        """All tokens of a text, also those that a request would not read."""
        encoding = await unblocked(len(text), lambda: self._whole.encode(text))
        return Tokens(encoding.ids, encoding.tokens, self._max_tokens)

    async def encode(self, texts: Sequence[str], truncation: Truncation) -> list[list[int]]:
        """Token ids of each text, special tokens included. Raises InvalidInput for Truncation.REFUSE."""
        tokenizer = self._cutter(truncation) if truncation.value else self._whole
        encodings = await unblocked(sum(map(len, texts)), lambda: tokenizer.encode_batch_fast(list(texts)))
        found = [encoding.ids for encoding in encodings]
        if truncation is Truncation.REFUSE:
            for index, ids in enumerate(found):
                if len(ids) > self._max_tokens:
                    raise InvalidInput(
                        f"inputs[{index}]",
                        f"{len(ids)} tokens, but {self.key.model} reads {self._max_tokens} at most",
                    )
        return found

    async def cached(self, encoded: Sequence[Sequence[int]], output: str, budget: Budget) -> Values:
        """FP32 [texts, components] of the one `output`; only what is not in the cache is computed, and each
        text once. Raises what `compute` raises."""
        keys = [self.cache.key(ids) for ids in encoded]
        found: dict[bytes, Values] = {}
        missing: dict[bytes, Row] = {}
        for key, ids in zip(keys, encoded, strict=True):
            if key in found or key in missing:
                continue
            if (values := self.cache.get(key)) is not None:
                found[key] = values
            else:
                missing[key] = Row(ids)
        if missing:
            computed = await self.compute(list(missing.values()), budget)
            for key, outputs in zip(missing, computed, strict=True):
                found[key] = outputs[output]
                self.cache.put(key, outputs[output])
        return np.stack([found[key] for key in keys])

    async def compute(self, rows: Sequence[Row], budget: Budget) -> list[dict[str, Values]]:
        """The graph's outputs for each row, in order; what it has for each token, for the row's own tokens.
        Rows of like length share a request, so that little is padded; Triton batches the requests of all
        callers. Raises what Triton.infer raises."""
        found: list[dict[str, Values]] = [{} for _ in rows]
        traceparent = current_traceparent()
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def run(chunk: list[int]) -> None:
            async with gate:
                tensors = self._tensors([rows[index] for index in chunk])
                outputs = await self._triton.infer(
                    self.key, tensors, traceparent, budget.left(), budget.priority
                )
            for at, index in enumerate(chunk):
                for name, components in self._outputs.items():
                    values = outputs[name][at]
                    found[index][name] = values if components >= 0 else values[: len(rows[index].ids)]

        chunks = runs([len(row.ids) for row in rows], MAX_BATCH)
        if len(chunks) == 1:  # the most frequent case, without a task
            await run(chunks[0])
            return found
        tasks = [asyncio.ensure_future(run(chunk)) for chunk in chunks]
        try:  # no TaskGroup: it would wrap the error that callers are to see
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return found

    def _tensors(self, rows: Sequence[Row]) -> Mapping[str, npt.NDArray[Any]]:
        """INT64 [rows, tokens], padded to the longest."""
        shape = (len(rows), max(len(row.ids) for row in rows))
        tensors = {name: np.zeros(shape, np.int64) for name in self._inputs}
        for index, row in enumerate(rows):
            tensors["input_ids"][index, : len(row.ids)] = row.ids
            tensors["attention_mask"][index, : len(row.ids)] = 1
            if "token_type_ids" in tensors and row.types:
                tensors["token_type_ids"][index, : len(row.ids)] = row.types
        return tensors

    def _cutter(self, truncation: Truncation) -> Tokenizer:
        """The tokenizer that cuts this side; truncation is a tokenizer's state, so each has its own."""
        if truncation not in self._cutting:
            tokenizer = Tokenizer.from_str(self._whole.to_str())
            tokenizer.enable_truncation(self._max_tokens, direction=truncation.value)
            self._cutting[truncation] = tokenizer
        return self._cutting[truncation]
