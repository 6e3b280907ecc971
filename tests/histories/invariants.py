"""What has to hold of etcd's history whoever wrote it: numbers, and transactions that happened as a whole."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from lingqu.registry.v1 import models_pb2
from services.registry.stages import ALLOWED
from tests.histories.truth import Event, Truth
from tests.histories.views import CLIENTS, MODELS, REVOKED

READY, SERVING = models_pb2.STAGE_READY, models_pb2.STAGE_SERVING
RETIRED, REGISTERED = models_pb2.STAGE_RETIRED, models_pb2.STAGE_REGISTERED


def problems(truth: Truth) -> Iterator[str]:
    names = {event.key.removeprefix(MODELS).partition("/")[0] for event in truth.under(MODELS)}
    for name in sorted(names):
        yield from _numbering(truth, name, "versions")
        yield from _numbering(truth, name, "releases")
        yield from _requests(truth, name)
        yield from _tasks(truth, name)
        yield from _whole(truth, name)
        yield from _stages(truth, name)
    for key, count in Counter(e.key for e in truth.under(REVOKED) if e.value is not None).items():
        if count > 1:
            yield f"{key} was written {count} times"


def deletions(truth: Truth, client: str) -> int:
    return sum(e.value is None for e in truth.under(CLIENTS) if e.key == CLIENTS + client)


def _numbering(truth: Truth, name: str, kind: str) -> Iterator[str]:
    """From 1, without a gap, each written once."""
    prefix = f"{MODELS}{name}/{kind}/"
    written = [int(e.key.removeprefix(prefix)) for e in truth.under(prefix) if e.value is not None]
    if written != list(range(1, len(written) + 1)):
        wrong = next(n for n, number in enumerate(written, 1) if n != number)
        yield f"{kind} of {name} are not 1, 2, 3 …: {written[max(0, wrong - 3) : wrong + 2]}"


def _requests(truth: Truth, name: str) -> Iterator[str]:
    """The record of a request id is written once, with the version that it created."""
    prefix = f"{MODELS}{name}/requests/"
    written = [e for e in truth.under(prefix) if e.value is not None]
    for key, count in Counter(e.key for e in written).items():
        if count > 1:
            yield f"{key} was written {count} times"
    for event in written:
        version = truth.at(f"{MODELS}{name}/versions/{int(event.value or b'0'):08d}", event.revision)
        if version is None or version.revision != event.revision:
            yield f"{event.key} names version {event.value!r}, which was not created with it"


def _tasks(truth: Truth, name: str) -> Iterator[str]:
    created = [e.value for e in truth.under(f"{MODELS}{name}/versions/") if e.value is not None]
    tasks = {models_pb2.ModelVersion.FromString(value).task for value in created}
    if len(tasks) > 1:
        yield f"versions of {name} are for different tasks: {sorted(tasks)}"


def _whole(truth: Truth, name: str) -> Iterator[str]:
    """At every revision traffic, the last release and the stages agree."""
    prefix = f"{MODELS}{name}/"
    traffic, newest = models_pb2.Model(), models_pb2.Release()
    stages: dict[int, int] = {}
    for revision, events in Truth(truth.under(prefix)).by_revision():
        for event in events:
            kind, _, number = event.key.removeprefix(prefix).partition("/")
            value = event.value or b""
            if kind == "traffic":
                traffic = models_pb2.Model.FromString(value)
            elif kind == "releases" and event.value is not None:
                last, newest = newest, models_pb2.Release.FromString(value)
                if newest.time.ToNanoseconds() <= last.time.ToNanoseconds():
                    yield f"release {newest.number} of {name} is not later than the one before"
                if newest.before != last.after:
                    yield f"release {newest.number} of {name} does not follow the one before"
            elif kind == "stages":
                stages[int(number)] = models_pb2.ModelVersion.FromString(value).stage
        serving = {w.version for w in traffic.traffic.weights} | {traffic.traffic.shadow_version} - {0}
        if newest.number != traffic.last_release or newest.after != traffic.traffic:
            yield f"revision {revision}: traffic of {name} is not that of its last release {newest.number}"
        if (newest.previous_release, newest.previous_traffic) != (
            traffic.previous_release,
            traffic.previous_traffic,
        ):
            yield f"revision {revision}: the way back of {name} is not that of its last release"
        if serving != {number for number, stage in stages.items() if stage == SERVING}:
            yield f"revision {revision}: {name} has traffic on {serving}, stages are {stages}"
        for alias, named in traffic.traffic.aliases.items():
            if stages.get(named) == RETIRED:
                yield f'revision {revision}: "{alias}" of {name} is version {named}, which is retired'


def _stages(truth: Truth, name: str) -> Iterator[str]:
    """Each version goes from stage to stage as it may."""
    prefix = f"{MODELS}{name}/stages/"
    for key, events in itertools.groupby(
        sorted(truth.under(prefix), key=lambda e: (e.key, e.revision)), lambda e: e.key
    ):
        stage: models_pb2.Stage.ValueType = REGISTERED
        for event in events:
            following = _stage(event)
            if following not in ALLOWED[stage]:
                was, is_ = models_pb2.Stage.Name(stage), models_pb2.Stage.Name(following)
                yield f"revision {event.revision}: {key} went from {was} to {is_}"
            stage = following


def _stage(event: Event) -> models_pb2.Stage.ValueType:
    return models_pb2.ModelVersion.FromString(event.value or b"").stage
