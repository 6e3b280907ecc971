"""Between protobuf and what is judged; every mistake names its field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lingqu.metrics.v1 import answers_pb2
from lingqu.registry.v1 import models_pb2, rollouts_pb2
from services.core.errors import InvalidInput
from services.metrics.verdicts.answers import Answer, Content, Failed, Labels, Tokens, Vectors
from services.metrics.verdicts.trial import Opinion, Terms

MAX_ANSWERS = 1000
MAX_TEXTS = 1000
MAX_NAME, MAX_PAIR, MAX_LABEL = 64, 128, 256
MAX_BYTES = 1 << 20
_TERMS = ("false_alarms", "error_increase", "label_disagreement", "cosine_distance", "token_divergence")
_OPINIONS = {
    Opinion.NONE: rollouts_pb2.VERDICT_UNSPECIFIED,
    Opinion.PASS: rollouts_pb2.VERDICT_PASS,
    Opinion.FAIL: rollouts_pb2.VERDICT_FAIL,
}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One that is in progress, from version `before` to `version`. `judged`: verdicts are wanted."""

    id: str
    model: str
    version: int
    before: int
    step: int
    terms: Terms
    judged: bool


def to_rollout(model: models_pb2.Model) -> Rollout | None:
    """The model's rollout, if one is in progress."""
    rollout = model.rollout
    if rollout.state != rollouts_pb2.ROLLOUT_STATE_RUNNING:
        return None
    asked = rollout.plan.judgement
    given: dict[str, Any] = {name: getattr(asked, name) for name in _TERMS if asked.HasField(name)}  # type: ignore[arg-type]
    if asked.HasField("slowdown"):
        given["slowdown"] = asked.slowdown
    if asked.HasField("least"):
        given["least"] = asked.least
    return Rollout(
        rollout.id,
        model.name,
        rollout.version,
        rollout.from_version,
        rollout.step,
        Terms(**given),
        not asked.off,
    )


def from_opinion(opinion: Opinion) -> rollouts_pb2.Verdict.ValueType:
    return _OPINIONS[opinion]


def to_answers(request: answers_pb2.ReportAnswersRequest) -> list[Answer]:
    """Raises InvalidInput."""
    if len(request.answers) > MAX_ANSWERS:
        raise InvalidInput("answers", f"at most {MAX_ANSWERS}")
    return [_answer(answer, f"answers[{number}]") for number, answer in enumerate(request.answers)]


def _answer(answer: answers_pb2.Answer, field: str) -> Answer:
    if not 0 < len(answer.model) <= MAX_NAME:
        raise InvalidInput(f"{field}.model", f"1 to {MAX_NAME} characters are needed")
    if not answer.version:
        raise InvalidInput(f"{field}.version", "is required")
    if not 0 < len(answer.pair) <= MAX_PAIR:
        raise InvalidInput(f"{field}.pair", f"1 to {MAX_PAIR} characters are needed")
    if answer.ByteSize() > MAX_BYTES:
        raise InvalidInput(field, f"at most {MAX_BYTES >> 20} MiB")
    content = _content(answer, field)
    return Answer(answer.model, answer.version, answer.pair, answer.copy, answer.input, content)


def _content(answer: answers_pb2.Answer, field: str) -> Content:
    match answer.WhichOneof("content"):
        case "labels":
            found = tuple(answer.labels.labels)
            if len(found) > MAX_TEXTS or any(len(label) > MAX_LABEL for label in found):
                raise InvalidInput(f"{field}.labels", f"at most {MAX_TEXTS}, of {MAX_LABEL} characters")
            return Labels(found)
        case "vectors":
            rows = [vector.fp16 for vector in answer.vectors.vectors]
            if len(rows) > MAX_TEXTS or len({len(row) for row in rows}) > 1 or (rows and len(rows[0]) % 2):
                raise InvalidInput(f"{field}.vectors", f"at most {MAX_TEXTS} rows of as many FP16 numbers")
            values = np.frombuffer(b"".join(rows), "<f2")
            return Vectors(values.reshape(len(rows), -1) if rows else values.reshape(0, 0))
        case "tokens":
            if len(answer.tokens.digests) % 2:
                raise InvalidInput(f"{field}.tokens.digests", "two bytes of each token are needed")
            return Tokens(answer.tokens.digests, answer.tokens.vocabulary)
        case "failure":
            return Failed()
    raise InvalidInput(f"{field}.content", "one of labels, vectors, tokens and failure is needed")
