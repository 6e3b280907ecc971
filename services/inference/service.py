"""`InferenceService`: convert, delegate, convert."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TypeVar

from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import InferenceServiceServicer
from services.core.errors import Unsupported, WrongTask
from services.core.interceptors import Context
from services.inference import comparisons, convert, convert_tasks
from services.inference.admission import Admission
from services.inference.callers import answering, caller
from services.inference.classifier import ClassifierModel
from services.inference.generation import Generation
from services.inference.questions import AnswerModel
from services.inference.routing import Routing
from services.inference.served import Served, TensorModel
from services.inference.text import Delta, TextModel
from services.inference.vectors import VectorModel

VERSION_HEADER = "x-lingqu-model-version"

M = TypeVar("M", TextModel, VectorModel, ClassifierModel, AnswerModel)


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
        shape, who = convert_tasks.to_shape(request), caller(context, request.priority)
        async with self._admission.request(model.key, who) as asked:
            vectors = await model.embed(
                texts,
                who.remaining,
                dimensions=shape.dimensions,
                normalize=shape.normalize,
                truncation=convert_tasks.to_truncation(request.truncation),
                priority=who.priority,
            )
            asked.prompt_tokens = vectors.tokens
            asked.answer = comparisons.vectors((texts[: comparisons.TEXTS], shape), vectors.values)
        return convert.to_embed_response(vectors, str(model.key.version))

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        texts, top = convert.to_texts(request), convert_tasks.to_top(request)
        model = self._model(request.model, ClassifierModel, "gives no labels", context)
        who, truncation = caller(context, request.priority), convert_tasks.to_truncation(request.truncation)
        async with self._admission.request(model.key, who) as asked:
            classes = await model.classify(texts, who.remaining, truncation=truncation, priority=who.priority)
            asked.prompt_tokens = classes.tokens
            asked.answer = comparisons.labels(
                texts[: comparisons.TEXTS], classes, model.labels, model.multi_label
            )
        return convert_tasks.to_classify_response(classes, model.labels, top, str(model.key.version))

    async def Answer(self, request: pb.AnswerRequest, context: Context) -> pb.AnswerResponse:
        job = convert_tasks.to_question(request)
        model = self._model(request.model, AnswerModel, "answers no questions", context)
        who = caller(context, request.priority)
        async with self._admission.request(model.key, who) as asked:
            answers = await model.answer(job, who.remaining, priority=who.priority)
            asked.prompt_tokens = answers.tokens
            found = [request.context[span.start : span.end] for span in answers.spans[:1]]
            asked.answer = comparisons.extract(job, "".join(found))
        return convert_tasks.to_answer_response(answers, request.context, str(model.key.version))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        texts = convert.to_score_texts(request)
        model = self._model(request.model, TextModel, "generates no text", context)
        async with self._admission.request(model.key, caller(context, request.priority)) as asked:
            scores = await model.score(texts, request.prefix)
            asked.prompt_tokens = sum(score.read for score in scores)
        return convert.to_score_response(scores, request.tokens, str(model.key.version))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        text = convert_tasks.to_tokenize_text(request)
        turns, tools = convert.turns(request.messages), convert.tools(request.tools)
        model = self._routed(request.model, context)
        if isinstance(model, TensorModel):
            raise WrongTask("model", f'"{request.model}" reads no text')
        if isinstance(model, TextModel):
            tokens = await model.tokenize(text, turns, tools)
        elif turns:
            raise Unsupported("messages", f'"{request.model}" has no chat template; send text instead')
        else:
            tokens = await model.tokenize(text)
        return convert_tasks.to_tokenize_response(tokens, str(model.key.version))

    def _model(self, name: str, kind: type[M], otherwise: str, context: Context) -> M:
        model = self._routed(name, context)
        if not isinstance(model, kind):
            raise WrongTask("model", f'"{name}" {otherwise}')
        return model

    def _routed(self, name: str, context: Context) -> Served:
        """The gateway says which version; without its word the registry's traffic decides."""
        metadata = dict(context.invocation_metadata() or ())
        return self._routing.model(answering(name, metadata), str(metadata.get(VERSION_HEADER, "")))
