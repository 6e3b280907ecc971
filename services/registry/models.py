"""`ModelService`: immutable versions of models, their stages, releases, policies and placement."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial

from lingqu.registry.v1 import models_pb2 as pb
from lingqu.registry.v1.models_pb2_grpc import ModelServiceServicer
from services.core.errors import Conflict, InvalidInput, NotReady
from services.core.identity import Callers
from services.core.interceptors import Context
from services.core.signing import SignatureRefused, TrustedKeys
from services.registry import keyspace, policies, stages, traffic, validation
from services.registry.catalog import Catalog, shows
from services.registry.commits import Commits
from services.registry.conductor import Conductor
from services.registry.etcd import Put, Unchanged
from services.registry.keyspace import MODELS
from services.registry.mirror import Mirror, Update
from services.registry.releases import Asked, Releases
from services.registry.watching import Feed

CREATE_TRIES = 16
REQUEST_TTL_S = 86_400


class Models(ModelServiceServicer):
    def __init__(
        self,
        mirror: Mirror,
        catalog: Catalog,
        commits: Commits,
        releases: Releases,
        conductor: Conductor,
        callers: Callers,
        trusted: TrustedKeys | None,
    ) -> None:
        self._mirror = mirror
        self._catalog = catalog
        self._commits = commits
        self._releases = releases
        self._conductor = conductor
        self._callers = callers
        self._trusted = trusted
        self._feed = Feed(mirror, MODELS, self._respond, reads_mirror=True)

    async def CreateModelVersion(
        self, request: pb.CreateModelVersionRequest, context: Context
    ) -> pb.CreateModelVersionResponse:
        if not request.HasField("version"):
            raise InvalidInput("version", "is required")
        caller = self._callers.of(context.invocation_metadata())
        version = pb.ModelVersion()
        version.CopyFrom(validation.version(request.version))
        self._check_signature(version)
        for name in ("stage", "stage_detail", "stage_time"):
            version.ClearField(name)
        version.creator = caller.client
        name = version.model
        request_key = keyspace.model(name, "requests", validation.request_id(request.request_id))
        lease = 0
        for _ in range(CREATE_TRIES):
            if request.request_id and (done := self._mirror.get(request_key)):
                return pb.CreateModelVersionResponse(version=self._repeated(version, int(done.value)))
            self._check_task(version)
            version.version = 1 + self._catalog.newest(name)
            version.create_time.GetCurrentTime()
            key = keyspace.version(name, version.version)
            puts, only_if = [Put(key, version.SerializeToString())], [Unchanged(key, 0)]
            if request.request_id:
                lease = lease or await self._commits.lease(REQUEST_TTL_S)
                puts.append(Put(request_key, str(version.version).encode(), lease))
                only_if.append(Unchanged(request_key, 0))
            try:
                await self._commits.commit(puts, only_if)
            except Conflict:  # somebody else took the number: take the next once our copy has theirs
                await self._commits.caught_up()
            else:
                return pb.CreateModelVersionResponse(version=self._catalog.version(name, version.version))
        raise Conflict(f'versions of "{name}" are being created too fast; try again')

    async def GetModelVersion(
        self, request: pb.GetModelVersionRequest, context: Context
    ) -> pb.GetModelVersionResponse:
        name = validation.model_name("model", request.model)
        return pb.GetModelVersionResponse(
            version=self._catalog.version(name, request.version),
            replicas=[
                pb.VersionReplica(
                    instance=instance, state=held.state, detail=held.detail, will_retry=held.will_retry
                )
                for instance, held in self._catalog.hosting(name, request.version)
            ],
        )

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        if request.model:
            validation.model_name("model", request.model)
        return pb.ListModelVersionsResponse(
            models=self._catalog.models(request.model),
            revision=self._mirror.revision,
            stale=self._mirror.stale,
        )

    async def SetTraffic(self, request: pb.SetTrafficRequest, context: Context) -> pb.SetTrafficResponse:
        weights = validation.weights(request)
        asked = self._asked(pb.RELEASE_KIND_SET_TRAFFIC, request, context)
        name = validation.model_name("model", request.model)
        shadow, percent = request.shadow_version, request.shadow_percent
        change = partial(traffic.split, weights=weights, shadow=shadow, shadow_percent=percent)
        return pb.SetTrafficResponse(model=await self._release(name, change, asked))

    async def PromoteModelVersion(
        self, request: pb.PromoteModelVersionRequest, context: Context
    ) -> pb.PromoteModelVersionResponse:
        asked = self._asked(pb.RELEASE_KIND_PROMOTE, request, context)
        name = validation.model_name("model", request.model)
        change = partial(traffic.all_to, version=request.version)
        return pb.PromoteModelVersionResponse(model=await self._release(name, change, asked))

    async def RollbackModel(
        self, request: pb.RollbackModelRequest, context: Context
    ) -> pb.RollbackModelResponse:
        asked = self._asked(pb.RELEASE_KIND_ROLLBACK, request, context)

        async def attempt(model: pb.Model) -> pb.Model:
            if self._releases.repeated(model, asked):
                return model
            policies.check_releaser(model, asked.caller, "roll back")
            state = traffic.back(model, self._releases.history(model.name))
            for number in traffic.shares(state.traffic):
                self._releases.ready(model.name, number)
            basis = self._releases.basis(model, state.traffic)
            settled = self._conductor.settled(model, asked.caller)
            return await self._releases.carry_out(model, state, asked, basis, settled)

        name = validation.model_name("model", request.model)
        return pb.RollbackModelResponse(model=await self._releases.settled(name, asked, attempt))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        alias = validation.alias(request.alias)
        asked = self._asked(pb.RELEASE_KIND_ALIAS, request, context)

        async def attempt(model: pb.Model) -> pb.Model:
            after = traffic.named(model, alias, request.version)
            if self._releases.repeated(model, asked) or after == model.traffic:
                return model
            policies.check_releaser(model, asked.caller, "name versions of")
            if request.version:
                self._releases.ready(model.name, request.version)
            basis = self._releases.basis(model, after)
            return await self._releases.carry_out(model, traffic.aside(model, after), asked, basis)

        name = validation.model_name("model", request.model)
        return pb.SetAliasResponse(model=await self._releases.settled(name, asked, attempt))

    async def ListReleases(
        self, request: pb.ListReleasesRequest, context: Context
    ) -> pb.ListReleasesResponse:
        model = self._catalog.model(validation.model_name("model", request.model))
        limit = validation.within("limit", request.limit or 100, 1, 1000)
        return pb.ListReleasesResponse(releases=self._catalog.releases(model.name, limit))

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyResponse:
        policy = validation.policy(request.policy)
        if policy.releasers and not self._callers.known:
            raise InvalidInput("policy.releasers", "this registry knows no callers: it has no LINGQU_JWKS")
        caller = self._callers.of(context.invocation_metadata())
        model = self._catalog.model(validation.model_name("model", request.model))
        _check_satisfiable("policy.min_ready_replicas", policy, model.placement)
        if not caller.admin:
            policies.check_releaser(model, caller, "change the policy of")
        await self._replace(keyspace.model(model.name, "policy"), policy)
        return pb.SetPolicyResponse(model=self._catalog.model(model.name))

    async def SetPlacement(
        self, request: pb.SetPlacementRequest, context: Context
    ) -> pb.SetPlacementResponse:
        placement = validation.placement(request.placement)
        model = self._catalog.model(validation.model_name("model", request.model))
        caller = self._callers.of(context.invocation_metadata())
        policies.check_releaser(model, caller, "place versions of")
        _check_satisfiable("placement.replicas", model.policy, placement)
        for number in placement.keep:
            self._catalog.version(model.name, number)
        await self._replace(keyspace.model(model.name, "placement"), placement)
        return pb.SetPlacementResponse(model=self._catalog.model(model.name))

    async def RetireModelVersion(
        self, request: pb.RetireModelVersionRequest, context: Context
    ) -> pb.RetireModelVersionResponse:
        await self._commits.caught_up()
        model = self._catalog.model(validation.model_name("model", request.model))
        named = [name for name, number in model.traffic.aliases.items() if number == request.version]
        if named:
            raise NotReady(f'version {request.version} is "{named[0]}"; move the name first')
        version = await self._restage(request, stages.RETIRED, context)
        return pb.RetireModelVersionResponse(version=version)

    async def RestoreModelVersion(
        self, request: pb.RestoreModelVersionRequest, context: Context
    ) -> pb.RestoreModelVersionResponse:
        await self._commits.caught_up()
        version = await self._restage(request, stages.REGISTERED, context)
        return pb.RestoreModelVersionResponse(version=version)

    def WatchModels(
        self, request: pb.WatchModelsRequest, context: Context
    ) -> AsyncIterator[pb.WatchModelsResponse]:
        return self._feed.serve(request, context)

    def _respond(self, update: Update, view: str) -> pb.WatchModelsResponse:
        names = sorted({keyspace.model_of(c.key) for c in update.changes if shows(c.key)})
        models = {model.name: model for name in names for model in self._catalog.models(name)}
        removed = [name for name in names if name not in models]
        return pb.WatchModelsResponse(upserted=models.values(), removed=removed)

    def _asked(
        self,
        kind: pb.ReleaseKind.ValueType,
        request: pb.SetTrafficRequest
        | pb.PromoteModelVersionRequest
        | pb.RollbackModelRequest
        | pb.SetAliasRequest,
        context: Context,
    ) -> Asked:
        return Asked(
            kind,
            self._callers.of(context.invocation_metadata()),
            validation.reason(request.reason),
            validation.request_id(request.request_id),
            request.expected_revision,
        )

    async def _release(self, name: str, change: Callable[[pb.Model], pb.Traffic], asked: Asked) -> pb.Model:
        """A release as the policy governs it. Nothing to change is no release."""

        async def attempt(model: pb.Model) -> pb.Model:
            after = change(model)
            if self._releases.repeated(model, asked, after):
                return model
            policies.check_releaser(model, asked.caller, "release")
            self._conductor.check_idle(model)
            basis = self._releases.admissible(model, after)
            if after == model.traffic and model.last_release:
                return model
            settled = self._conductor.settled(model, asked.caller)
            pace = await self._releases.pace(model)
            state = traffic.forward(model, after)
            return await self._releases.carry_out(model, state, asked, basis, settled, pace)

        return await self._releases.settled(name, asked, attempt)

    async def _replace(self, key: str, value: pb.Policy | pb.Placement) -> None:
        unchanged = self._commits.unchanged(key)
        if value.ByteSize():
            await self._commits.commit([Put(key, value.SerializeToString())], unchanged)
        else:
            await self._commits.commit([], unchanged, [key])

    async def _restage(
        self,
        request: pb.RetireModelVersionRequest | pb.RestoreModelVersionRequest,
        to: stages.Stage,
        context: Context,
    ) -> pb.ModelVersion:
        name = validation.model_name("model", request.model)
        caller = self._callers.of(context.invocation_metadata())
        model, version = self._catalog.model(name), self._catalog.version(name, request.version)
        policies.check_releaser(model, caller, "retire or restore versions of")
        if version.stage != to:
            stages.check(version, to)
            key = keyspace.stage(name, request.version)
            record = stages.record(to, validation.reason(request.reason))
            only_if = self._commits.unchanged(key, keyspace.model(name, "traffic"))
            await self._commits.commit([Put(key, record.SerializeToString())], only_if)
        return self._catalog.version(name, request.version)

    def _repeated(self, version: pb.ModelVersion, number: int) -> pb.ModelVersion:
        """The version that was created by the same request."""
        created = self._catalog.version(version.model, number)
        if created.artifact != version.artifact:
            raise InvalidInput("request_id", f"was used already, for version {number}")
        return created

    def _check_task(self, version: pb.ModelVersion) -> None:
        """Versions of one model are exchangeable, so all do the same task."""
        for record in self._mirror.under(keyspace.model(version.model, "versions/")):
            if (task := pb.ModelVersion.FromString(record.value).task) != version.task:
                raise InvalidInput("version.task", f'the versions of "{version.model}" are for "{task}"')

    def _check_signature(self, version: pb.ModelVersion) -> None:
        if self._trusted is not None:
            artifact = version.artifact
            try:
                self._trusted.verify(version.model, artifact.sha256, artifact.signature, artifact.signer)
            except SignatureRefused as err:
                raise InvalidInput("version.artifact.signature", str(err)) from err


def _check_satisfiable(field: str, policy: pb.Policy, placement: pb.Placement) -> None:
    if 0 < placement.replicas < policy.min_ready_replicas:
        raise InvalidInput(
            field,
            f"{policy.min_ready_replicas} replicas have to be ready and {placement.replicas} hold a version: "
            "nothing could be released",
        )
