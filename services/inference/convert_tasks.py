"""Between protobuf messages and the values inside, for what encoders do; every rule of a request's fields is
here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput
from services.inference.classifier import Classes
from services.inference.convert import MAX_TEXT_BYTES
from services.inference.encoder import Truncation
from services.inference.questions import Answers, Question
from services.inference.tokens import Tokens

MAX_QUESTION_BYTES = 8 << 10
MAX_ANSWERS = 20
MAX_ANSWER_TOKENS = 512
DEFAULT_ANSWER_TOKENS = 32

_TRUNCATIONS = {
    pb.TRUNCATION_UNSPECIFIED: Truncation.END,
    pb.TRUNCATION_END: Truncation.END,
    pb.TRUNCATION_START: Truncation.START,
    pb.TRUNCATION_REFUSE: Truncation.REFUSE,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How vectors are wanted; None: as the model has them."""

    dimensions: int | None
    normalize: bool | None


def to_shape(request: pb.EmbedRequest) -> Shape:
    """Raises InvalidInput. What the model has at most, it says itself."""
    return Shape(
        _positive("dimensions", request.dimensions) if request.HasField("dimensions") else None,
        request.normalize if request.HasField("normalize") else None,
    )


def to_truncation(value: pb.Truncation.ValueType) -> Truncation:
    """Raises InvalidInput for a number that means nothing."""
    if value not in _TRUNCATIONS:
        raise InvalidInput("truncation", f"{value} is none of the known ones")
    return _TRUNCATIONS[value]


def to_top(request: pb.ClassifyRequest) -> int | None:
    """How many labels of each text; None: all. Raises InvalidInput."""
    return _positive("top", request.top) if request.HasField("top") else None


def to_question(request: pb.AnswerRequest) -> Question:
    """Raises InvalidInput."""
    _sized("question", request.question, MAX_QUESTION_BYTES)
    _sized("context", request.context, MAX_TEXT_BYTES)
    top = request.top if request.HasField("top") else 1
    if not 1 <= top <= MAX_ANSWERS:
        raise InvalidInput("top", f"{top}, but must be 1 to {MAX_ANSWERS}")
    tokens = request.max_answer_tokens if request.HasField("max_answer_tokens") else DEFAULT_ANSWER_TOKENS
    if not 1 <= tokens <= MAX_ANSWER_TOKENS:
        raise InvalidInput("max_answer_tokens", f"{tokens}, but must be 1 to {MAX_ANSWER_TOKENS}")
    return Question(request.question, request.context, top, tokens)


def to_tokenize_text(request: pb.TokenizeRequest) -> str:
    """The text, or an empty one where there are messages. Raises InvalidInput."""
    if bool(request.text) == bool(request.messages):
        raise InvalidInput("text", "exactly one of text and messages must be given, and not be empty")
    if request.text:
        _sized("text", request.text, MAX_TEXT_BYTES)
    if request.tools and not request.messages:
        raise InvalidInput("tools", "are for a chat: send messages instead of text")
    return request.text


def to_classify_response(
    classes: Classes, labels: tuple[str, ...], top: int | None, version: str
) -> pb.ClassifyResponse:
    results = []
    order = np.argsort(-classes.scores, axis=1, kind="stable")[:, :top]
    for row, best in zip(classes.scores.tolist(), order.tolist(), strict=True):
        found = [pb.Label(name=labels[at], score=row[at]) for at in best]
        results.append(pb.Classification(labels=found))
    return pb.ClassifyResponse(
        results=results, usage=pb.Usage(prompt_tokens=classes.tokens), model_version=version
    )


def to_answer_response(answers: Answers, context: str, version: str) -> pb.AnswerResponse:
    spans = [
        pb.Span(text=context[span.start : span.end], start=span.start, end=span.end, score=span.score)
        for span in answers.spans
    ]
    return pb.AnswerResponse(
        answers=spans, usage=pb.Usage(prompt_tokens=answers.tokens), model_version=version
    )


def to_tokenize_response(tokens: Tokens, version: str) -> pb.TokenizeResponse:
    return pb.TokenizeResponse(
        token_ids=tokens.ids, tokens=tokens.tokens, max_tokens=tokens.max_tokens, model_version=version
    )


def _positive(field: str, value: int) -> int:
    if value < 1:
        raise InvalidInput(field, f"{value}, but must be 1 or more; leave it out for all")
    return value


def _sized(field: str, text: str, most: int) -> None:
    if not 1 <= (size := len(text.encode())) <= most:
        raise InvalidInput(field, f"{size} bytes, but must have 1 to {most}")
