"""Texts are scored one after the other; those that take long say that they are in progress."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.inference.backends import score
from services.inference.backends.score import CHUNK, Logprobs, Scorer

VOCABULARY = 5


class Request:
    """An inference request whose every chunk waits for `go`."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)

    def reset_state(self) -> None: ...

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        assert self.go.acquire(timeout=10)
        return {"logits": np.zeros((1, inputs["input_ids"].shape[1], VOCABULARY), np.float32)}


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> Request:
    made = Request()

    class Core:
        def compile_model(self, *_: Any) -> Core:
            return self

        def create_infer_request(self) -> Request:
            return made

    monkeypatch.setattr(score.openvino, "Core", Core)
    monkeypatch.setattr(score, "WORKING_S", 0.0)
    return made


def test_a_long_text_says_that_it_is_in_progress(request_: Request) -> None:
    scorer, ended, told = Scorer(Path("x.xml")), threading.Event(), []
    scorer.submit(1, [0] * (3 * CHUNK + 1), lambda *_: ended.set(), lambda: told.append(1))
    request_.go.release(3)
    assert ended.wait(10)
    assert len(told) == 3
    scorer.close()


def test_cancelled_texts_are_not_computed_and_leave_nothing(request_: Request) -> None:
    scorer, answers = Scorer(Path("x.xml")), dict[int, tuple[Logprobs | None, str]]()
    done = threading.Semaphore(0)

    def answer(key: int) -> Any:
        def put(found: Logprobs | None, why: str) -> None:
            answers[key] = found, why
            done.release()

        return put

    for key in (1, 2):
        scorer.submit(key, [0] * (2 * CHUNK), answer(key))
    for key in range(2, 1000):  # generations are cancelled by the same command
        scorer.cancel(key)
    request_.go.release(2)
    assert done.acquire(timeout=10)
    assert done.acquire(timeout=10)
    assert answers[1][0] is not None
    assert answers[2] == (None, "cancelled")
    assert not scorer._wanted
    scorer.close()
