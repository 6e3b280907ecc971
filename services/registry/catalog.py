"""Models as they are in the registry's copy of etcd: records put together."""

from __future__ import annotations

import itertools

from lingqu.registry.v1 import instances_pb2, models_pb2, rollouts_pb2
from services.core.errors import NotFound
from services.registry import keyspace
from services.registry.keyspace import INSTANCES, MODELS
from services.registry.mirror import Mirror
from services.registry.stages import REGISTERED
from services.registry.traffic import main_version


class Catalog:
    """Reads; owns nothing."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def names(self) -> list[str]:
        keys = (record.key for record in self._mirror.under(MODELS))
        return [name for name, _ in itertools.groupby(keys, keyspace.model_of)]

    def models(self, only: str = "") -> list[models_pb2.Model]:
        """All that have a version, or this one if it has, ordered by name."""
        found = (self._assembled(name) for name in ([only] if only else self.names()))
        return [model for model in found if model.versions]

    def model(self, name: str) -> models_pb2.Model:
        """Raises NotFound."""
        model = self._assembled(name)
        if not model.versions:
            raise NotFound(f'there is no model "{name}"')
        return model

    def version(self, name: str, number: int) -> models_pb2.ModelVersion:
        """With its stage. Raises NotFound."""
        record = self._mirror.get(keyspace.version(name, number))
        if record is None:
            raise NotFound(f'model "{name}" has no version {number}')
        version = models_pb2.ModelVersion.FromString(record.value)
        stage = self._mirror.get(keyspace.stage(name, number))
        _set_stage(version, stage.value if stage else None)
        return version

    def newest(self, name: str) -> int:
        """Number of the newest version; 0 if there is none."""
        versions = self._mirror.under(keyspace.model(name, "versions/"))
        return int(versions[-1].key.rpartition("/")[2]) if versions else 0

    def hosting(self, name: str, version: int) -> list[tuple[str, instances_pb2.HostedModel]]:
        """What each live replica says of a version, ordered by instance."""
        found = []
        for record in self._mirror.under(INSTANCES):
            instance = instances_pb2.Instance.FromString(record.value)
            found += [
                (instance.id, held)
                for held in instance.models
                if held.version == version and held.model == name
            ]
        return found

    def releases(self, name: str, limit: int) -> list[models_pb2.Release]:
        """Newest first."""
        records = self._mirror.under(keyspace.model(name, "releases/"))
        return [models_pb2.Release.FromString(record.value) for record in reversed(records[-limit:])]

    def _assembled(self, name: str) -> models_pb2.Model:
        model = models_pb2.Model(name=name)
        records = self._mirror.under(keyspace.model(name) + "/")
        for record in sorted(records, key=lambda r: precedence(r.key)):
            merge(model, record.key, record.value, record.mod_revision)
        return model


def precedence(key: str) -> bool:
    """Sorts the records of one moment for `merge`: a version comes before what is said of it."""
    return not keyspace.is_version(key)


def merge(model: models_pb2.Model, key: str, value: bytes | None, mod_revision: int = 0) -> bool:
    """Fold one record, or its deletion, into `model`; False if the record does not show in it."""
    kind, _, number = key.removeprefix(keyspace.model(model.name) + "/").partition("/")
    match kind:
        case "versions":
            _merge_version(model, int(number), value)
        case "stages":
            for version in model.versions:
                if version.version == int(number):
                    _set_stage(version, value)
        case "traffic":
            _merge_traffic(model, value, mod_revision)
        case "policy" | "placement" | "rollout" if value is None:
            model.ClearField(kind)
        case "policy":
            model.policy.CopyFrom(models_pb2.Policy.FromString(value or b""))
        case "placement":
            model.placement.CopyFrom(models_pb2.Placement.FromString(value or b""))
        case "rollout":
            model.rollout.CopyFrom(rollouts_pb2.Rollout.FromString(value or b""))
        case _:
            return False
    return True


def _merge_version(model: models_pb2.Model, number: int, value: bytes | None) -> None:
    kept = [v for v in model.versions if v.version != number]
    if value is not None:
        version = models_pb2.ModelVersion.FromString(value)
        _set_stage(version, None)
        kept.append(version)
    del model.versions[:]
    model.versions.extend(sorted(kept, key=lambda v: v.version))


def _set_stage(version: models_pb2.ModelVersion, value: bytes | None) -> None:
    stage = models_pb2.ModelVersion.FromString(value or b"")
    version.stage = stage.stage or REGISTERED
    version.stage_detail = stage.stage_detail
    version.stage_time.CopyFrom(stage.stage_time if value else version.create_time)


def _merge_traffic(model: models_pb2.Model, value: bytes | None, mod_revision: int) -> None:
    stored = models_pb2.Model.FromString(value or b"")
    if not stored.HasField("traffic") and stored.traffic_version:  # written before there were weights
        stored.traffic.weights.add(version=stored.traffic_version, percent=100)
        if stored.previous_version:
            stored.previous_traffic.weights.add(version=stored.previous_version, percent=100)
    model.traffic.CopyFrom(stored.traffic)
    model.previous_traffic.CopyFrom(stored.previous_traffic)
    model.last_release, model.release = stored.last_release, stored.release
    model.previous_release = stored.previous_release
    model.traffic_version = main_version(stored.traffic)
    model.previous_version = main_version(stored.previous_traffic)
    model.traffic_revision = mod_revision
