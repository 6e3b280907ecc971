"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput
from services.inference import convert
from services.inference.callers import Priority
from services.inference.rest.answers import Answer, Whole
from services.inference.rest.bodies import parsed
from services.inference.rest.endpoint import Asked
from services.inference.rest.schemas import EmbeddingRequest
from services.inference.rest.serving import EmbedJob, Models
from services.inference.vectors import Vectors


class Embeddings:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, asked: Asked) -> Answer:
        request = parsed(asked.body, EmbeddingRequest)
        job = to_job(request)
        model = self._models.vector(request.model, asked.headers)
        try:
            vectors = await self._models.embed(model, job, asked.caller(Priority.NORMAL))
        except InvalidInput as err:
            raise type(err)(_name(err.field), err.description) from err
        return Whole(_body(request, vectors))


def to_job(request: EmbeddingRequest) -> EmbedJob:
    """Raises InvalidInput, naming OpenAI's parameter."""
    given: Any = [request.input] if isinstance(request.input, str) else request.input
    if not 1 <= len(given) <= convert.MAX_INPUTS and not (given and isinstance(given[0], int)):
        raise InvalidInput("input", f"{len(given)} texts, but 1 to {convert.MAX_INPUTS} are allowed")
    if isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], list):
        for at, row in enumerate(given):
            if not row:
                raise InvalidInput(f"input[{at}]", "is empty")
        return EmbedJob(token_ids=given, dimensions=request.dimensions)
    try:
        texts = convert.to_texts(pb.EmbedRequest(inputs=given))
    except InvalidInput as err:
        field = "input" if isinstance(request.input, str) else _name(err.field)
        raise type(err)(field, err.description) from err
    return EmbedJob(texts=texts, dimensions=request.dimensions)


def _name(field: str) -> str:
    return field.replace("inputs", "input", 1) if field.startswith("inputs") else field


def _body(request: EmbeddingRequest, vectors: Vectors) -> bytes:
    rows = np.ascontiguousarray(vectors.values, "<f4")
    encoded: Any = rows
    if request.encoding_format == "base64":
        encoded = [base64.b64encode(row.tobytes()).decode() for row in rows]
    data = [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(encoded)]
    used = {"prompt_tokens": vectors.tokens, "total_tokens": vectors.tokens}
    body = {"object": "list", "data": data, "model": request.model, "usage": used}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
