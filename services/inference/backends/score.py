"""How likely a text model finds a text: log-probabilities of its tokens, from the graph itself.

The continuous-batching pipeline tells them for prompts only where no prefix is cached (seen), so the same
graph is compiled once more, without paging, when the first score is asked for. It computes in FP32: BF16, the
default where a processor has it, was off by up to 0.2 for single tokens of the bundled model.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

CHUNK = 128  # tokens at a time: bounds the logits in memory
MAX_PENDING = 256

Logprobs = npt.NDArray[np.float32]
Done = Callable[[Logprobs | None, str], None]
"""Called with the log-probabilities, or with None and the reason."""
Working = Callable[[], None]
"""Called while a text takes long, at most every WORKING_S."""
WORKING_S = 1.0


class Scorer:
    """A thread that scores one text after the other. `weights` is an openvino_model.xml."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._request: Any = None
        self._jobs: queue.Queue[tuple[int, Sequence[int], Done, Working] | None] = queue.Queue(MAX_PENDING)
        self._wanted: set[int] = set()
        self._thread = threading.Thread(target=self._loop, name="score", daemon=True)
        self._thread.start()

    def submit(self, key: int, ids: Sequence[int], done: Done, working: Working = lambda: None) -> None:
        """Queue a text of at least two tokens. Raises queue.Full."""
        self._wanted.add(key)
        try:
            self._jobs.put_nowait((key, ids, done, working))
        except queue.Full:
            self._wanted.discard(key)
            raise

    def cancel(self, key: int) -> None:
        """Nobody waits for it any more; asked of keys that are not here, too."""
        self._wanted.discard(key)

    def close(self) -> None:
        while True:
            try:
                self._jobs.put_nowait(None)
            except queue.Full:
                self._jobs.get_nowait()
            else:
                break
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            key, ids, done, working = job
            try:
                found = self._score(key, ids, working)
                done(found, "cancelled" if found is None else "")
            except Exception as err:  # the next text may be fine
                done(None, f"the text could not be scored: {err}")
            self._wanted.discard(key)

    def _score(self, key: int, ids: Sequence[int], working: Working) -> Logprobs | None:
        """FP32 [tokens - 1]: of each token but the first, given those before it. None if cancelled."""
        if self._request is None:
            properties = {"INFERENCE_PRECISION_HINT": "f32"}
            model = openvino.Core().compile_model(self._weights, "CPU", properties)
            self._request = model.create_infer_request()
        self._request.reset_state()
        tokens = np.asarray(ids, np.int64)
        found = np.empty(len(tokens) - 1, np.float32)
        told = time.monotonic()
        for start in range(0, len(found), CHUNK):
            if key not in self._wanted:
                return None
            if time.monotonic() - told >= WORKING_S:
                told = time.monotonic()
                working()
            end = min(start + CHUNK, len(found))
            inputs = {
                "input_ids": tokens[None, start:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(start, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            logits = self._request.infer(inputs)["logits"][0]
            top = logits.max(axis=-1, keepdims=True)
            total = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
            chosen = tokens[start + 1 : end + 1]
            found[start:end] = logits[np.arange(end - start), chosen] - total
        return found
