"""What a watcher has to know at each revision, put together from etcd's history alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from lingqu.registry.v1 import access_pb2, instances_pb2, models_pb2, rollouts_pb2
from tests.histories.records import canonical
from tests.histories.truth import Event, Truth

INSTANCES, MODELS = "/lingqu/instances/", "/lingqu/models/"
CLIENTS, REVOKED = "/lingqu/access/clients/", "/lingqu/access/revoked/"
SHOWN = ("versions", "stages", "traffic", "policy", "placement", "rollout")

State = dict[str, bytes]


class Timeline:
    """Its state after each revision that changed it."""

    def __init__(self) -> None:
        self._revisions = [0]
        self._states: list[State] = [{}]

    def add(self, revision: int, changes: dict[str, bytes | None]) -> None:
        state = {**self._states[-1], **{k: v for k, v in changes.items() if v is not None}}
        self._revisions.append(revision)
        self._states.append({k: v for k, v in state.items() if changes.get(k, b"") is not None})

    @property
    def last(self) -> int:
        return self._revisions[-1]

    def at(self, revision: int) -> State:
        return self._states[bisect_right(self._revisions, revision) - 1]


def timelines(truth: Truth) -> dict[str, Timeline]:
    """By the name of the watched service."""
    return {
        "instances": _flat(truth, {INSTANCES: _instance}),
        "access": _flat(truth, {CLIENTS: _client, REVOKED: _revoked}),
        "models": _models(truth),
    }


Shown = Callable[[Event], tuple[str, bytes]]


def _flat(truth: Truth, shown: dict[str, Shown]) -> Timeline:
    """Of services that show each record as one item."""
    timeline = Timeline()
    for revision, events in truth.by_revision():
        changes: dict[str, bytes | None] = {}
        for event in events:
            for prefix, show in shown.items():
                if event.key.startswith(prefix):
                    name, item = show(event)
                    changes[name] = item if event.value is not None else None
        if changes:
            timeline.add(revision, changes)
    return timeline


def _instance(event: Event) -> tuple[str, bytes]:
    return event.key.removeprefix(INSTANCES), canonical(instances_pb2.Instance.FromString(event.value or b""))


def _client(event: Event) -> tuple[str, bytes]:
    client = access_pb2.Client.FromString(event.value or b"")
    client.revision = event.revision
    return f"client/{event.key.removeprefix(CLIENTS)}", canonical(client)


def _revoked(event: Event) -> tuple[str, bytes]:
    key = access_pb2.RevokedKey.FromString(event.value or b"")
    return f"key/{event.key.removeprefix(REVOKED)}", canonical(key)


def _models(truth: Truth) -> Timeline:
    """A model is shown once it has a version."""
    timeline = Timeline()
    records: dict[str, dict[str, Event]] = {}
    for revision, events in truth.by_revision():
        changed = set()
        for event in events:
            name, _, rest = event.key.removeprefix(MODELS).partition("/")
            if event.key.startswith(MODELS) and rest.partition("/")[0] in SHOWN:
                of = records.setdefault(name, {})
                if event.value is None:
                    of.pop(rest, None)
                else:
                    of[rest] = event
                changed.add(name)
        if changed:
            timeline.add(revision, {name: _model(name, records[name]) for name in changed})
    return timeline


def _model(name: str, records: dict[str, Event]) -> bytes | None:
    model = models_pb2.Model(name=name)
    for path in sorted(path for path in records if path.startswith("versions/")):
        version = models_pb2.ModelVersion.FromString(records[path].value or b"")
        stage = records.get(path.replace("versions/", "stages/"))
        if stage is None:
            version.stage = models_pb2.STAGE_REGISTERED
            version.stage_time.CopyFrom(version.create_time)
        else:
            version.MergeFromString(stage.value or b"")
        model.versions.append(version)
    if not model.versions:
        return None
    if traffic := records.get("traffic"):
        model.MergeFromString(traffic.value or b"")
        model.traffic_revision = traffic.revision
    if policy := records.get("policy"):
        model.policy.CopyFrom(models_pb2.Policy.FromString(policy.value or b""))
    if placement := records.get("placement"):
        model.placement.CopyFrom(models_pb2.Placement.FromString(placement.value or b""))
    if rollout := records.get("rollout"):
        model.rollout.CopyFrom(rollouts_pb2.Rollout.FromString(rollout.value or b""))
    return canonical(model)
