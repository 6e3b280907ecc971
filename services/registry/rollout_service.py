"""`RolloutService`: the handlers around the conductor."""

from __future__ import annotations

from lingqu.registry.v1 import models_pb2, rollouts_pb2
from lingqu.registry.v1 import rollouts_pb2 as pb
from lingqu.registry.v1.rollouts_pb2_grpc import RolloutServiceServicer
from services.core.errors import InvalidInput, NotFound
from services.core.identity import Callers
from services.core.interceptors import Context
from services.registry import plans, validation
from services.registry.catalog import Catalog
from services.registry.conductor import Conductor
from services.registry.releases import Asked


class Rollouts(RolloutServiceServicer):
    def __init__(self, catalog: Catalog, conductor: Conductor, callers: Callers) -> None:
        self._catalog = catalog
        self._conductor = conductor
        self._callers = callers

    async def StartRollout(
        self, request: pb.StartRolloutRequest, context: Context
    ) -> pb.StartRolloutResponse:
        name = validation.model_name("model", request.model)
        asked = Asked(
            models_pb2.RELEASE_KIND_ROLLOUT,
            self._callers.of(context.invocation_metadata()),
            validation.reason(request.reason),
            validation.request_id(request.request_id),
            request.expected_revision,
        )
        plan = plans.plan(request.plan)
        rollout = await self._conductor.start(name, request.version, plan, asked)
        return pb.StartRolloutResponse(rollout=rollout)

    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> pb.GetRolloutResponse:
        model = self._catalog.model(validation.model_name("model", request.model))
        if not model.rollout.id:
            raise NotFound(f'"{model.name}" has had no rollout')
        return pb.GetRolloutResponse(rollout=model.rollout)

    async def ListRollouts(
        self, request: pb.ListRolloutsRequest, context: Context
    ) -> pb.ListRolloutsResponse:
        rollouts = [model.rollout for model in self._catalog.models() if model.rollout.id]
        return pb.ListRolloutsResponse(rollouts=rollouts)

    async def ReportVerdict(
        self, request: pb.ReportVerdictRequest, context: Context
    ) -> pb.ReportVerdictResponse:
        name = validation.model_name("model", request.model)
        caller = self._callers.of(context.invocation_metadata())
        if not request.rollout:
            raise InvalidInput("rollout", "is required; GetRollout tells it")
        report = rollouts_pb2.VerdictReport(
            step=request.step,
            verdict=request.verdict,
            figures=validation.figures("figures", request.figures),
            samples=request.samples,
            reporter=caller.client,
            detail=validation.reason(request.detail, "detail"),
        )
        rollout = await self._conductor.report(name, request.rollout, report, caller)
        return pb.ReportVerdictResponse(rollout=rollout)

    async def AbortRollout(
        self, request: pb.AbortRolloutRequest, context: Context
    ) -> pb.AbortRolloutResponse:
        name = validation.model_name("model", request.model)
        caller = self._callers.of(context.invocation_metadata())
        reason = validation.reason(request.reason)
        return pb.AbortRolloutResponse(rollout=await self._conductor.abort(name, reason, caller))
