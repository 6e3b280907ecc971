"""Whether what clients were answered is what etcd's history has: nothing acknowledged is lost or happened
twice, nothing refused happened, and what did happen happened while the client waited for it."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lingqu.registry.v1 import access_pb2, instances_pb2, models_pb2
from tests.histories.invariants import REGISTERED, RETIRED, deletions
from tests.histories.records import FAULTS, NO_ANSWER, Operation, Outcome, Stream
from tests.histories.truth import Event, Truth
from tests.histories.views import CLIENTS, INSTANCES, MODELS, REVOKED

RELEASES = {
    "SetTraffic": models_pb2.RELEASE_KIND_SET_TRAFFIC,
    "PromoteModelVersion": models_pb2.RELEASE_KIND_PROMOTE,
    "RollbackModel": models_pb2.RELEASE_KIND_ROLLBACK,
    "SetAlias": models_pb2.RELEASE_KIND_ALIAS,
}
RESTAGES = {"RetireModelVersion": RETIRED, "RestoreModelVersion": REGISTERED}
# Where an operation leaves its id. Those that delete leave none.
LEAVES = {
    "CreateModelVersion": "versions",
    **dict.fromkeys(RELEASES, "releases"),
    **dict.fromkeys(RESTAGES, "stages"),
    "SetClient": "client",
    "RevokeKey": "key",
    "RegisterInstance": "instance",
}


@dataclass(frozen=True, slots=True)
class Window:
    """Revisions at which an operation can have been carried out."""

    first: int
    last: int


class Clock:
    """Which revisions etcd can have had at a time, as all answers and messages tell."""

    def __init__(
        self, truth: Truth, effects: Iterable[tuple[Operation, Event]], streams: list[Stream]
    ) -> None:
        seen = [(m.time, m.revision) for stream in streams for m in stream.messages]
        later = []
        for operation, event in effects:
            later.append((operation.begun, event.revision))
            if operation.outcome is Outcome.DONE:
                seen.append((operation.ended, event.revision))
        seen.sort()
        later.sort(reverse=True)
        self._seen = [time for time, _ in seen]
        self._least = [0, *itertools.accumulate((r for _, r in seen), max)]
        self._begun = [time for time, _ in reversed(later)]
        self._most = [truth.last + 1, *itertools.accumulate((r for _, r in later), min)][::-1]

    def least(self, time: float) -> int:
        """etcd had this revision already."""
        return self._least[bisect_right(self._seen, time)]

    def most(self, time: float) -> int:
        """etcd had not gone beyond this one."""
        return self._most[bisect_left(self._begun, time)] - 1

    def window(self, operation: Operation) -> Window:
        first = self.least(operation.begun)
        last = self.most(operation.ended) if operation.outcome is Outcome.DONE else self._most[-1] - 1
        return Window(first, max(first, last))


def effects(truth: Truth) -> dict[tuple[str, str], list[Event]]:
    """What operations have left, by where and by the operation's id."""
    found: defaultdict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in truth.events:
        value = event.value
        if value is None:
            continue
        if event.key.startswith(MODELS):
            kind = event.key.removeprefix(MODELS).split("/")[1]
            if kind == "versions":
                found[kind, models_pb2.ModelVersion.FromString(value).labels["op"]].append(event)
            elif kind == "releases":
                found[kind, models_pb2.Release.FromString(value).reason].append(event)
            elif kind == "stages":
                found[kind, models_pb2.ModelVersion.FromString(value).stage_detail].append(event)
        elif event.key.startswith(CLIENTS):
            found["client", access_pb2.Client.FromString(value).labels["op"]].append(event)
        elif event.key.startswith(REVOKED):
            found["key", access_pb2.RevokedKey.FromString(value).reason].append(event)
        elif event.key.startswith(INSTANCES):
            found["instance", instances_pb2.Instance.FromString(value).labels["op"]].append(event)
    return found


def problems(truth: Truth, operations: list[Operation], streams: list[Stream]) -> Iterator[str]:
    left = effects(truth)
    of = {op.id: left.get((LEAVES.get(op.method, ""), op.id), []) for op in operations}
    clock = Clock(truth, ((op, e) for op in operations for e in of[op.id][:1]), streams)
    for op in operations:
        for problem in _operation(truth, op, of[op.id], clock):
            yield f"{problem}: {op}"
    for client in sorted({op.target for op in operations if op.method == "DeleteClient"}):
        asked = [op for op in operations if op.method == "DeleteClient" and op.target == client]
        possible = sum(op.outcome is not Outcome.FAILED for op in asked)
        if (made := deletions(truth, client)) > possible:
            yield f"client {client} was deleted {made} times, {possible} times at most it was asked for"


def _operation(truth: Truth, op: Operation, left: list[Event], clock: Clock) -> Iterator[str]:
    window = clock.window(op)
    if op.error in FAULTS:
        yield "answered with a fault"
    if len(left) > 1:
        yield f"happened {len(left)} times, at revisions {[e.revision for e in left]}"
    elif left and op.outcome is Outcome.FAILED:
        yield f"refused, yet it happened at revision {left[0].revision}"
    elif left:
        event = left[0]
        if not window.first < event.revision <= window.last:
            yield f"happened at revision {event.revision}, outside of {window}"
        if op.error not in (None, *NO_ANSWER, *FAULTS) and event.revision <= clock.least(op.last_begun):
            yield f"repeated and refused, although it had happened at revision {event.revision}"
        yield from _as_asked(truth, op, event)
    elif op.outcome is Outcome.DONE and not _needless(truth, op, window):
        yield f"acknowledged, but it left no trace within {window}"


def _as_asked(truth: Truth, op: Operation, event: Event) -> Iterator[str]:
    """What happened is what was asked for, on the condition given; and the answer says so."""
    value, request, answer = event.value or b"", op.request, op.response
    if op.method in RELEASES:
        entry = models_pb2.Release.FromString(value)
        key = f"{MODELS}{op.target}/traffic"
        before = truth.at(key, event.revision - 1)
        if entry.kind != RELEASES[op.method] or not _wanted(op, entry.after):
            yield f"is in the history as something else, {entry}"
        if request.expected_revision and request.expected_revision != (before.revision if before else 0):
            yield f"followed revision {before.revision if before else 0}, not the one expected"
        if answer is not None:
            yield from _answered(truth, op, key, event.revision)
    elif answer is None:
        return
    elif op.method == "CreateModelVersion":
        if event.key != f"{MODELS}{op.target}/versions/{answer.version.version:08d}":
            yield f"is {event.key}, but was answered as {answer.version.version}"
    elif op.method == "SetClient":
        before = truth.at(event.key, event.revision - 1)
        if request.expected_revision and request.expected_revision != (before.revision if before else 0):
            yield f"followed revision {before.revision if before else 0}, not the one expected"
        if answer.client.revision != event.revision:
            yield f"happened at {event.revision}, but was answered as {answer.client.revision}"
    elif op.method == "RegisterInstance" and (answer.revision, answer.lease_id) != (
        event.revision,
        event.lease,
    ):
        yield f"happened at {event.revision} under lease {event.lease}, but was answered otherwise"


def _answered(truth: Truth, op: Operation, key: str, revision: int) -> Iterator[str]:
    """The model in the answer is one that was, and not from before the release."""
    model = op.response.model
    record = truth.at(key, model.traffic_revision)
    stored = models_pb2.Model.FromString(record.value or b"") if record else models_pb2.Model()
    if record is None or record.revision != model.traffic_revision or stored.traffic != model.traffic:
        yield f"was answered with traffic that never was, at revision {model.traffic_revision}"
    if model.traffic_revision < revision:
        yield f"happened at revision {revision}, was answered with the model at {model.traffic_revision}"


def _needless(truth: Truth, op: Operation, window: Window) -> bool:
    """Whether, at some moment while the client waited, there was nothing to do."""

    def ever(key: str) -> list[Event | None]:
        return truth.between(key, window.first, window.last)

    match op.method:
        case "SetTraffic" | "PromoteModelVersion" | "SetAlias":
            found = ever(f"{MODELS}{op.target}/traffic")
            stored = [models_pb2.Model.FromString((e and e.value) or b"") for e in found]
            return any(_wanted(op, model.traffic) for model in stored)
        case "RetireModelVersion" | "RestoreModelVersion":
            found = ever(f"{MODELS}{op.target}/stages/{op.request.version:08d}")
            stages = [
                models_pb2.ModelVersion.FromString(e.value or b"").stage if e else REGISTERED for e in found
            ]
            return RESTAGES[op.method] in stages
        case "RevokeKey":
            found = ever(REVOKED + op.target)
            return any(
                e and access_pb2.RevokedKey.FromString(e.value or b"") == op.response.key for e in found
            )
        case "DeleteClient":
            return None in ever(CLIENTS + op.target)
        case "DeregisterInstance":
            lease = op.request.lease_id
            return any(e is None or lease not in (0, e.lease) for e in ever(INSTANCES + op.target))
        case _:
            return False


def _wanted(op: Operation, traffic: models_pb2.Traffic) -> bool:
    """Whether traffic is as a release was to make it."""
    shares = {w.version: w.percent for w in traffic.weights}
    match op.method:
        case "SetTraffic":
            asked = {w.version: w.percent for w in op.request.weights}
            return (shares, traffic.shadow_version) == (asked, op.request.shadow_version)
        case "PromoteModelVersion":
            number = op.request.version
            return shares == {number: 100} and traffic.aliases.get("stable") == number
        case "SetAlias":
            return bool(traffic.aliases.get(op.request.alias, 0) == op.request.version)
        case _:
            return True
