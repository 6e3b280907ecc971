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

SHOWN = ("versions", "stages", "traffic", "policy", "placement", "rollout")


class _Fleet:
    """The live replicas of inference: what they hold, by version, and their labels."""

    def __init__(self, mirror: Mirror) -> None:
        self.held: dict[tuple[str, int], list[tuple[str, instances_pb2.HostedModel]]] = {}
        self.labels: dict[str, dict[str, str]] = {}
        for record in mirror.under(INSTANCES):
            instance = instances_pb2.Instance.FromString(record.value)
            if instance.service == "inference":
                self.labels[instance.id] = dict(instance.labels)
            for held in instance.models:
                self.held.setdefault((held.model, held.version), []).append((instance.id, held))


class Catalog:
    """Reads; owns nothing."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._fleet_now = _Fleet(mirror)
        self._fleet_of = -1

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
        _set_stage(version, stage.value if stage else b"")
        return version

    def newest(self, name: str) -> int:
        """Number of the newest version; 0 if there is none."""
        versions = self._mirror.under(keyspace.model(name, "versions/"))
        return int(versions[-1].key.rpartition("/")[2]) if versions else 0

    def hosting(self, name: str, version: int) -> list[tuple[str, instances_pb2.HostedModel]]:
        """What each live replica says of a version, ordered by instance."""
        return self._fleet().held.get((name, version), [])

    def fitting(self, placement: models_pb2.Placement) -> list[str]:
        """The live replicas that could hold versions placed like this."""
        wanted = placement.labels.items()
        return [name for name, labels in self._fleet().labels.items() if wanted <= labels.items()]

    def _fleet(self) -> _Fleet:
        """Made once for each state of the mirror: models are asked for one by one."""
        if self._fleet_of != self._mirror.revision:
            self._fleet_now, self._fleet_of = _Fleet(self._mirror), self._mirror.revision
        return self._fleet_now

    def releases(self, name: str, limit: int) -> list[models_pb2.Release]:
        """Newest first."""
        records = self._mirror.under(keyspace.model(name, "releases/"))
        return [models_pb2.Release.FromString(record.value) for record in reversed(records[-limit:])]

    def _assembled(self, name: str) -> models_pb2.Model:
        model = models_pb2.Model(name=name)
        stages: dict[str, bytes] = {}
        prefix = keyspace.model(name) + "/"
        for record in self._mirror.under(prefix):  # in the order of their keys: stages before versions
            kind, _, number = record.key.removeprefix(prefix).partition("/")
            match kind:
                case "stages":
                    stages[number] = record.value
                case "versions":
                    version = models_pb2.ModelVersion.FromString(record.value)
                    _set_stage(version, stages.get(number, b""))
                    model.versions.append(version)
                case "traffic":
                    _set_traffic(model, models_pb2.Model.FromString(record.value), record.mod_revision)
                case "policy":
                    model.policy.CopyFrom(models_pb2.Policy.FromString(record.value))
                case "placement":
                    model.placement.CopyFrom(models_pb2.Placement.FromString(record.value))
                case "rollout":
                    model.rollout.CopyFrom(rollouts_pb2.Rollout.FromString(record.value))
        return model


def shows(key: str) -> bool:
    """Whether a record can be seen in its model."""
    return key.removeprefix(MODELS).split("/")[1] in SHOWN


def _set_stage(version: models_pb2.ModelVersion, stored: bytes) -> None:
    stage = models_pb2.ModelVersion.FromString(stored)
    version.stage = stage.stage or REGISTERED
    version.stage_detail = stage.stage_detail
    version.stage_time.CopyFrom(stage.stage_time if stored else version.create_time)


def _set_traffic(model: models_pb2.Model, stored: models_pb2.Model, revision: int) -> None:
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
    model.traffic_revision = revision
