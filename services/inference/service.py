"""`InferenceService`: convert, delegate, convert."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TypeVar

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceServicer
from services.core.errors import Unimplemented, WrongTask
from services.core.interceptors import Context
from services.inference import convert
from services.inference.admission import Admission
from services.inference.callers import caller
from services.inference.generation import Generation
from services.inference.routing import Routing
from services.inference.text import Delta, TextModel
from services.inference.vectors import VectorModel

VERSION_HEADER = "x-lingqu-model-version"

M = TypeVar("M", TextModel, VectorModel)


class Inference(InferenceServiceServicer):
    def __init__(self, routing: Routing, generation: Generation, admission: Admission) -> None:
        self._routing = routing
        self._generation = generation
        self._admission = admission

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        job = convert.to_generate_job(request)
        model = self._model(request.model, TextModel, "generates no text", context)
        who = caller(context, request.priority)
        candidates, last = [pb.Candidate() for _ in range(job.n)], Delta("")
        async with aclosing(self._generation.generate(model, job, who)) as deltas:
            async for last in deltas:
                convert.add_to_candidate(candidates[last.index], last)
        convert.find_calls(candidates, job)
        return convert.to_generate_response(candidates, last, str(model.key.version))

    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        job = convert.to_generate_job(request)
        model = self._model(request.model, TextModel, "generates no text", context)
        who, version = caller(context, request.priority), str(model.key.version)
        async with aclosing(self._generation.generate(model, job, who)) as deltas:
            async for delta in deltas:
                yield convert.to_chunk(delta, version)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        texts = convert.to_texts(request)
        model = self._model(request.model, VectorModel, "makes no vectors", context)
        who = caller(context, request.priority)
        async with self._admission.request(model.key, who) as asked:
            vectors = await model.embed(texts, who.remaining)
            asked.prompt_tokens = vectors.tokens
        return convert.to_embed_response(vectors, str(model.key.version))

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        raise Unimplemented("Classify is not there yet")

    async def Answer(self, request: pb.AnswerRequest, context: Context) -> pb.AnswerResponse:
        raise Unimplemented("Answer is not there yet")

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        texts = convert.to_score_texts(request)
        model = self._model(request.model, TextModel, "generates no text", context)
        async with self._admission.request(model.key, caller(context, request.priority)) as asked:
            scores = await model.score(texts, request.prefix)
            asked.prompt_tokens = sum(score.read for score in scores)
        return convert.to_score_response(scores, request.tokens, str(model.key.version))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        raise Unimplemented("Tokenize is not there yet")

    def _model(self, name: str, kind: type[M], otherwise: str, context: Context) -> M:
        """The gateway says which version; without its word the registry's traffic decides."""
        metadata = dict(context.invocation_metadata() or ())
        model = self._routing.model(name, str(metadata.get(VERSION_HEADER, "")))
        if not isinstance(model, kind):
            raise WrongTask("model", f'"{name}" {otherwise}')
        return model
