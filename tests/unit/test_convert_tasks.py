"""Every field of the encoders' requests at, below and above its bounds; errors name the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput
from services.inference import convert
from services.inference import convert_tasks as tasks
from services.inference.classifier import Classes
from services.inference.encoder import Truncation
from services.inference.extraction import Span
from services.inference.questions import Answers


def embed(**fields: Any) -> object:
    request = pb.EmbedRequest(**fields)
    return tasks.to_shape(request), tasks.to_truncation(request.truncation)


def classify(**fields: Any) -> object:
    request = pb.ClassifyRequest(**{"inputs": ["x"], **fields})
    return convert.to_texts(request), tasks.to_top(request), tasks.to_truncation(request.truncation)


def answer(**fields: Any) -> object:
    return tasks.to_question(pb.AnswerRequest(**{"question": "q", "context": "c", **fields}))


def tokenize(**fields: Any) -> object:
    return tasks.to_tokenize_text(pb.TokenizeRequest(**fields))


CHAT = [pb.Message(role="user", content="hello")]


@pytest.mark.parametrize(
    ("call", "fields", "field"),
    [
        (embed, {"dimensions": 0}, "dimensions"),
        (embed, {"dimensions": -1}, "dimensions"),
        (embed, {"truncation": 4}, "truncation"),
        (embed, {"truncation": -1}, "truncation"),
        (classify, {"inputs": []}, "inputs"),
        (classify, {"inputs": ["x"] * 2049}, "inputs"),
        (classify, {"inputs": ["x", ""]}, "inputs[1]"),
        (classify, {"top": 0}, "top"),
        (classify, {"top": -(2**31)}, "top"),
        (classify, {"truncation": 9}, "truncation"),
        (answer, {"question": ""}, "question"),
        (answer, {"question": "x" * (8192 + 1)}, "question"),
        (answer, {"context": ""}, "context"),
        (answer, {"context": "灵" * (2**20 // 3 + 1)}, "context"),
        (answer, {"top": 0}, "top"),
        (answer, {"top": 21}, "top"),
        (answer, {"max_answer_tokens": 0}, "max_answer_tokens"),
        (answer, {"max_answer_tokens": 513}, "max_answer_tokens"),
        (tokenize, {}, "text"),
        (tokenize, {"text": "x", "messages": CHAT}, "text"),
        (tokenize, {"text": "x" * (2**20 + 1)}, "text"),
        (tokenize, {"text": "x", "tools": [pb.Tool(name="t")]}, "tools"),
    ],
)
def test_a_wrong_field_is_named(call: Any, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        call(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        (embed, {"dimensions": 1, "normalize": False, "truncation": pb.TRUNCATION_REFUSE}),
        (embed, {"dimensions": 2**31 - 1}),  # what the model has, the model knows
        (classify, {"inputs": ["x"] * 2048, "top": 1}),
        (classify, {"top": 2**31 - 1}),
        (answer, {"question": "x" * 8192, "context": "x" * 2**20, "top": 20, "max_answer_tokens": 512}),
        (answer, {"top": 1, "max_answer_tokens": 1}),
        (tokenize, {"text": "x" * 2**20}),
        (tokenize, {"messages": CHAT, "tools": [pb.Tool(name="t")]}),
    ],
)
def test_bounds_are_allowed(call: Any, fields: dict[str, Any]) -> None:
    assert call(**fields) is not None


def test_what_is_not_said_is_left_to_the_model() -> None:
    assert embed() == (tasks.Shape(None, None), Truncation.END)
    assert embed(normalize=False) == (tasks.Shape(None, False), Truncation.END)
    assert tasks.to_top(pb.ClassifyRequest()) is None
    question = tasks.to_question(pb.AnswerRequest(question="q", context="c"))
    assert (question.top, question.max_answer_tokens) == (1, 32)


def test_labels_are_told_best_first() -> None:
    classes = Classes(np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]], np.float32), 7)
    told = tasks.to_classify_response(classes, ("a", "b", "c"), 2, "3")
    assert [[label.name for label in result.labels] for result in told.results] == [["b", "c"], ["a", "b"]]
    assert (told.usage.prompt_tokens, told.model_version) == (7, "3")
    whole = tasks.to_classify_response(classes, ("a", "b", "c"), None, "3")
    assert [len(result.labels) for result in whole.results] == [3, 3]


def test_answers_are_told_in_characters() -> None:
    told = tasks.to_answer_response(Answers([Span(2, 4, 0.5)], 9), "👩🏽 é灵渠", "1")
    assert told.answers[0].text == " é"
    assert (told.answers[0].start, told.answers[0].end) == (2, 4)
