"""Envoy's rate limit service, and the limiter's own for control planes and reporters of usage."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc

from lingqu.gateway.v1 import limiter_pb2 as pb
from lingqu.gateway.v1.limiter_pb2_grpc import LimiterServiceServicer
from services.core.errors import InvalidInput, LimitReached, LingquError
from services.core.interceptors import Context
from services.gateway import replies
from services.gateway.filters.global_limits import CLIENT_KEY, MODEL_KEY, TYPE_KEY
from services.gateway.filters.local_limits import LIMIT_HEADER
from services.gateway.headers import ADMITTED_HEADER
from services.gateway.limits.limiter import Limiter
from services.gateway.limits.peers import NotOwnerError
from services.gateway.limits.questions import Batch, Question, to_record
from services.gateway.limits.rules import KINDS
from services.gateway.limits.verdicts import Verdict

# For callers that set no deadline.
BUDGET_S = 1.0
MOST_QUESTIONS, MOST_USAGES = 4_096, 10_000
_Unit = rls_pb2.RateLimitResponse.RateLimit
_OK, _OVER = rls_pb2.RateLimitResponse.OK, rls_pb2.RateLimitResponse.OVER_LIMIT
_UNITS = {1_000: _Unit.SECOND, 60_000: _Unit.MINUTE, 86_400_000: _Unit.DAY}
_MOST = 2**32 - 1  # what Envoy can tell


class RateLimits(rls_pb2_grpc.RateLimitServiceServicer):  # type: ignore[misc]
    """Answers for one request: filters/global_limits.py says what Envoy sends. If it `tells`, the backend
    learns when the request was admitted, by the owner's steady clock in milliseconds."""

    def __init__(self, limiter: Limiter, *, tells: bool = False) -> None:
        self._limiter = limiter
        self._tells = tells

    async def ShouldRateLimit(self, request: Any, context: Context) -> Any:
        found = {entry.key: entry.value for d in request.descriptors for entry in d.entries}
        # What came out of a message is a JSON list; see filters/model.py.
        model = found.get(MODEL_KEY, "").removeprefix('["').removesuffix('"]')
        verdict = await self._limiter.decide(found.get(CLIENT_KEY, ""), model, _deadline(context))
        response = _response(verdict, grpc=found.get(TYPE_KEY, "").startswith("application/grpc"))
        if self._tells and verdict.admitted:
            response.request_headers_to_add.add(key=ADMITTED_HEADER, value=str(verdict.admitted))
        return response


class Limits(LimiterServiceServicer):
    """For other parts of the suite."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    async def Decide(self, request: pb.DecideRequest, context: Context) -> pb.DecideResponse:
        if len(request.questions) > MOST_QUESTIONS:
            raise InvalidInput("questions", f"at most {MOST_QUESTIONS}")
        deadline = _deadline(context)
        verdicts = await asyncio.gather(*(self._answer(q, deadline) for q in request.questions))
        return pb.DecideResponse(verdicts=verdicts)

    async def ReportUsage(self, request: pb.ReportUsageRequest, context: Context) -> pb.ReportUsageResponse:
        if not request.reporter:
            raise InvalidInput("reporter", "is required")
        if len(request.usages) > MOST_USAGES:
            raise InvalidInput("usages", f"at most {MOST_USAGES}")
        usages = {(usage.client, usage.model): usage.tokens for usage in request.usages}
        batch = Batch(request.reporter, request.sequence, usages)
        try:
            await self._limiter.charge(batch, _deadline(context))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        return pb.ReportUsageResponse()

    async def _answer(self, record: pb.Question, deadline: float) -> pb.Verdict:
        try:
            return to_record(await self._limiter.answer(Question.of(record), deadline))
        except NotOwnerError:
            return pb.Verdict(state=pb.Verdict.STATE_NOT_OWNER)
        except LingquError:
            return pb.Verdict()


def refusal(verdict: Verdict) -> LimitReached:
    kind = next(k for k in KINDS if (k.length_ms, k.tokens) == (verdict.window_ms, verdict.tokens))
    what = kind.field.replace("_", " ")
    whose, of = _whose(verdict.key)
    wait_s = verdict.wait_ms / 1000
    text = f"{whose} has used up its {verdict.limit} {what}; there is more in {wait_s:.1f} s"
    return LimitReached(text, kind.field, of, wait_s)


def _whose(key: str) -> tuple[str, str]:
    """In words, and as LimitReached has it."""
    side, name, *of_model = key.split("/")
    if side == "m":
        return f'model "{name}"', "model"
    if of_model:
        return f'client "{name}" of model "{of_model[0]}"', "client_model"
    return f'client "{name}"', "client"


def _response(verdict: Verdict, *, grpc: bool) -> Any:
    response = rls_pb2.RateLimitResponse(overall_code=_OK if verdict.admitted else _OVER)
    if verdict.limit:
        status = response.statuses.add(
            code=response.overall_code, limit_remaining=min(verdict.remaining, _MOST)
        )
        status.current_limit.requests_per_unit = min(verdict.limit, _MOST)
        status.current_limit.unit = _UNITS[verdict.window_ms]
        status.current_limit.name = "tokens" if verdict.tokens else "requests"
        status.duration_until_reset.seconds = _seconds(verdict)
    if not verdict.admitted:
        error = refusal(verdict)
        added = {LIMIT_HEADER: str(error), "retry-after": str(_seconds(verdict))}
        if grpc:
            added["grpc-status-details-bin"] = replies.details_header(error)
        for key, value in added.items():
            response.response_headers_to_add.add(key=key, value=value)
    return response


def _seconds(verdict: Verdict) -> int:
    """Whole ones, after which there is more."""
    return max(1, math.ceil(verdict.wait_ms / 1000))


def _deadline(context: Context) -> float:
    left_s = context.time_remaining()
    return asyncio.get_running_loop().time() + (BUDGET_S if left_s is None else left_s)
