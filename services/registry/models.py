"""`ModelService`: immutable versions of models, and which of them takes the traffic."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

from lingqu.registry.v1 import instances_pb2
from lingqu.registry.v1 import models_pb2 as pb
from lingqu.registry.v1.models_pb2_grpc import ModelServiceServicer
from services.core.errors import Conflict, InvalidInput, NotFound, NotReady
from services.core.interceptors import Context
from services.registry import validation
from services.registry.etcd import Etcd, Put, Unchanged
from services.registry.instances import INSTANCES
from services.registry.mirror import PREFIX, Mirror

MODELS = f"{PREFIX}models/"
CREATE_TRIES = 16


class Models(ModelServiceServicer):
    """Keys, all under MODELS: `<model>/versions/<8 digits>`, `<model>/requests/<request id>` (the number of
    the version that request created) and `<model>/traffic` (a Model with its two traffic fields only)."""

    def __init__(self, etcd: Etcd, mirror: Mirror) -> None:
        self._etcd = etcd
        self._mirror = mirror

    async def CreateModelVersion(
        self, request: pb.CreateModelVersionRequest, context: Context
    ) -> pb.CreateModelVersionResponse:
        if not request.HasField("version"):
            raise InvalidInput("version", "is required")
        version = pb.ModelVersion()
        version.CopyFrom(validation.version(request.version))
        self._check_task(version)
        request_key = f"{MODELS}{version.model}/requests/{validation.request_id(request.request_id)}"
        for _ in range(CREATE_TRIES):
            if request.request_id and (done := self._mirror.get(request_key)):
                return pb.CreateModelVersionResponse(version=self._version(version.model, int(done.value)))
            version.version = 1 + self._newest(version.model)
            version.create_time.GetCurrentTime()
            key = _version_key(version.model, version.version)
            puts = [Put(key, version.SerializeToString())]
            unchanged = [Unchanged(key, 0)]
            if request.request_id:
                puts.append(Put(request_key, str(version.version).encode()))
                unchanged.append(Unchanged(request_key, 0))
            if revision := await self._etcd.commit(puts, only_if=unchanged):
                await self._mirror.reached(revision)
                return pb.CreateModelVersionResponse(version=version)
            # Somebody else took the number: wait until our copy has it, and take the next.
            _, now = await self._etcd.read(key)
            await self._mirror.reached(now)
        raise Conflict(f'versions of "{version.model}" are being created too fast; try again')

    async def GetModelVersion(
        self, request: pb.GetModelVersionRequest, context: Context
    ) -> pb.GetModelVersionResponse:
        validation.model_name("model", request.model)
        return pb.GetModelVersionResponse(version=self._version(request.model, request.version))

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        if request.model:
            validation.model_name("model", request.model)
        prefix = f"{MODELS}{request.model}/" if request.model else MODELS
        names = [name for name, _ in itertools.groupby(_model_of(r.key) for r in self._mirror.under(prefix))]
        return pb.ListModelVersionsResponse(
            models=[self._model(name) for name in names],
            revision=self._mirror.revision,
            stale=self._mirror.stale,
        )

    async def SetTraffic(self, request: pb.SetTrafficRequest, context: Context) -> pb.SetTrafficResponse:
        validation.model_name("model", request.model)
        self._version(request.model, request.version)
        ready, reasons = self._readiness(request.model, request.version)
        if not ready:
            why = "; ".join(reasons) or "no live replica has loaded it yet"
            raise NotReady(f'version {request.version} of "{request.model}" is not ready: {why}')
        key = f"{MODELS}{request.model}/traffic"
        known = self._mirror.get(key)
        before = pb.Model.FromString(known.value) if known else pb.Model()
        if before.traffic_version != request.version:
            after = pb.Model(traffic_version=request.version, previous_version=before.traffic_version)
            only_if = [Unchanged(key, known.mod_revision if known else 0)]
            revision = await self._etcd.commit([Put(key, after.SerializeToString())], only_if=only_if)
            if not revision:
                raise Conflict(f'the traffic of "{request.model}" was changed by somebody else; look again')
            await self._mirror.reached(revision)
        return pb.SetTrafficResponse(model=self._model(request.model))

    async def WatchModels(
        self, request: pb.WatchModelsRequest, context: Context
    ) -> AsyncIterator[pb.WatchModelsResponse]:
        models: dict[str, pb.Model] = {}
        snapshot = True
        async for batch in self._mirror.follow(MODELS):
            touched: dict[str, None] = {}
            for change in batch.changes:
                name = _model_of(change.key)
                model = models.setdefault(name, pb.Model(name=name))
                if _merge(model, change.key, change.record.value if change.record else None):
                    touched[name] = None
            removed = [name for name in touched if not models[name].versions]
            for name in removed:
                del models[name]
            if snapshot or touched:
                upserted = [models[name] for name in touched if name in models]
                yield pb.WatchModelsResponse(
                    revision=batch.revision, snapshot=snapshot, upserted=upserted, removed=removed
                )
            snapshot = False

    def _model(self, name: str) -> pb.Model:
        model = pb.Model(name=name)
        for record in self._mirror.under(f"{MODELS}{name}/"):
            _merge(model, record.key, record.value)
        return model

    def _version(self, model: str, number: int) -> pb.ModelVersion:
        record = self._mirror.get(_version_key(model, number))
        if record is None:
            raise NotFound(f'model "{model}" has no version {number}')
        return pb.ModelVersion.FromString(record.value)

    def _check_task(self, version: pb.ModelVersion) -> None:
        """Versions of one model are exchangeable, so all do the same task."""
        for record in self._mirror.under(f"{MODELS}{version.model}/versions/"):
            if (task := pb.ModelVersion.FromString(record.value).task) != version.task:
                raise InvalidInput("version.task", f'the versions of "{version.model}" are for "{task}"')

    def _newest(self, model: str) -> int:
        versions = self._mirror.under(f"{MODELS}{model}/versions/")
        return int(versions[-1].key.rpartition("/")[2]) if versions else 0

    def _readiness(self, model: str, version: int) -> tuple[bool, list[str]]:
        """Whether a live replica has the version ready, and what the others say."""
        ready, reasons = False, []
        for record in self._mirror.under(INSTANCES):
            instance = instances_pb2.Instance.FromString(record.value)
            for hosted in instance.models:
                if (hosted.model, hosted.version) != (model, version):
                    continue
                if hosted.state == instances_pb2.HOSTED_STATE_READY:
                    ready = True
                elif hosted.state == instances_pb2.HOSTED_STATE_FAILED:
                    reasons.append(f"{instance.id}: {hosted.detail}")
        return ready, reasons


def _merge(model: pb.Model, key: str, value: bytes | None) -> bool:
    """Fold one record into `model`; False if the record does not show in it."""
    kind, _, rest = key.removeprefix(f"{MODELS}{model.name}/").partition("/")
    if kind == "traffic":
        traffic = pb.Model.FromString(value or b"")
        model.traffic_version = traffic.traffic_version
        model.previous_version = traffic.previous_version
    elif kind == "versions":
        kept = [v for v in model.versions if v.version != int(rest)]
        if value is not None:
            kept.append(pb.ModelVersion.FromString(value))
        del model.versions[:]
        model.versions.extend(sorted(kept, key=lambda v: v.version))
    else:
        return False
    return True


def _model_of(key: str) -> str:
    return key.removeprefix(MODELS).partition("/")[0]


def _version_key(model: str, number: int) -> str:
    return f"{MODELS}{model}/versions/{number:08d}"
