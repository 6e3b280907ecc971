"""The checker of histories finds nothing in a good one, and in each bad one what is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest

from lingqu.registry.v1 import access_pb2, models_pb2
from services.registry import traffic
from tests.histories.checker import problems
from tests.histories.records import Message, Operation, Outcome, Stream, canonical
from tests.histories.truth import Event, Truth
from tests.histories.views import timelines

SERVING, READY = models_pb2.STAGE_SERVING, models_pb2.STAGE_READY


@dataclass
class History:
    """A store, its clients and one watcher of each service. Operation n takes from second n to n + 0.5."""

    events: list[Event] = field(default_factory=list)
    operations: dict[str, Operation] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    model: models_pb2.Model = field(default_factory=models_pb2.Model)

    @property
    def revision(self) -> int:
        return self.events[-1].revision if self.events else 1

    def commit(self, **records: Any) -> int:
        """One transaction; "/" is "__" in the names of keys."""
        revision = self.revision + 1
        for name, message in records.items():
            key = f"/lingqu/{name.replace('__', '/')}"
            value = None if message is None else message.SerializeToString()
            self.events.append(Event(revision, key, value))
        return revision

    def did(self, name: str, method: str, target: str, request: Any, response: Any) -> None:
        at = float(len(self.operations))
        self.operations[name] = Operation(
            name, method, target, request, at, at, at + 0.5, Outcome.DONE, response
        )

    def create(self, name: str, number: int) -> None:
        version = models_pb2.ModelVersion(model="m", version=number, task="tensor", labels={"op": name})
        version.create_time.FromSeconds(number)
        self.commit(**{f"models__m__versions__{number:08d}": version})
        request = models_pb2.CreateModelVersionRequest(version=version)
        answer = models_pb2.CreateModelVersionResponse(version=version)
        self.did(name, "CreateModelVersion", "m", request, answer)

    def split(self, name: str, shares: dict[int, int], expected: int = 0) -> None:
        """SetTraffic as the registry does it."""
        after = traffic.split(self.model, shares, 0)
        state = traffic.forward(self.model, after)
        entry = models_pb2.Release(
            number=state.last_release,
            kind=models_pb2.RELEASE_KIND_SET_TRAFFIC,
            reason=name,
            before=self.model.traffic,
            after=after,
            previous_traffic=state.previous_traffic,
            previous_release=state.previous_release,
        )
        entry.time.FromSeconds(100 + state.last_release)
        changed = traffic.serving(self.model.traffic) ^ traffic.serving(after)
        stages = {
            f"models__m__stages__{n:08d}": models_pb2.ModelVersion(
                stage=SERVING if n in traffic.serving(after) else READY, stage_detail=name
            )
            for n in changed
        }
        release = {f"models__m__releases__{entry.number:08d}": entry}
        revision = self.commit(models__m__traffic=state, **release, **stages)
        self.model = state
        answered = models_pb2.Model(traffic=after, traffic_revision=revision)
        request = models_pb2.SetTrafficRequest(model="m", weights=after.weights, expected_revision=expected)
        self.did(name, "SetTraffic", "m", request, models_pb2.SetTrafficResponse(model=answered))

    def set_client(self, name: str, client_name: str) -> None:
        client = access_pb2.Client(name=client_name, labels={"op": name})
        revision = self.commit(**{f"access__clients__{client_name}": client})
        request = access_pb2.SetClientRequest(client=client)
        answer = access_pb2.SetClientResponse(client=access_pb2.Client(revision=revision))
        self.did(name, "SetClient", client_name, request, answer)

    def watch(self) -> None:
        """A watcher of each service that is told of every revision by itself."""
        for view, line in timelines(Truth(self.events)).items():
            messages, known = [Message(1, True, {}, time=-1.0)], line.at(1)
            for revision in range(2, self.revision + 1):
                now = line.at(revision)
                upserted = {k: v for k, v in now.items() if known.get(k) != v}
                removed = tuple(k for k in known if k not in now)
                if upserted or removed:
                    messages.append(Message(revision, False, upserted, removed, time=1e3))
                known = now
            self.streams[view] = Stream(view, f"watcher of {view}", messages)

    def problems(self) -> list[str]:
        return problems(Truth(self.events), list(self.operations.values()), list(self.streams.values()))


@pytest.fixture(scope="module")
def recorded() -> History:
    history = History()
    history.create("c1", 1)
    history.create("c2", 2)
    history.split("r1", {1: 100})
    history.set_client("s1", "v")
    history.split("r2", {1: 50, 2: 50}, expected=4)
    history.set_client("s2", "u")
    history.split("r3", {2: 100})
    history.commit(access__clients__u=None)
    request = access_pb2.DeleteClientRequest(name="u")
    history.did("d1", "DeleteClient", "u", request, access_pb2.DeleteClientResponse())
    history.watch()
    return history


@pytest.fixture
def history(recorded: History) -> History:
    return copy.deepcopy(recorded)


def test_a_good_history_has_no_problems(history: History) -> None:
    assert history.problems() == []
    assert [len(stream.messages) for stream in history.streams.values()] == [1, 4, 6]


def test_unknown_ones_may_have_happened_or_not(history: History) -> None:
    history.operations["s2"].outcome = Outcome.UNKNOWN
    request = access_pb2.SetClientRequest(client=access_pb2.Client(name="u"))
    history.operations["s3"] = Operation("s3", "SetClient", "u", request, 99.0)
    assert history.problems() == []


def test_resumed_and_folded_messages_are_fine(history: History) -> None:
    stream = history.streams["models"]
    first, *_, last = stream.messages
    everything = timelines(Truth(history.events))["models"].at(last.revision)
    stream.messages = [first, Message(last.revision, False, everything, time=1e3)]
    assert history.problems() == []


def without(history: History, *suffixes: str) -> None:
    history.events = [e for e in history.events if not e.key.endswith(suffixes)]


def lost_write(history: History) -> None:
    history.operations["c3"] = replace(
        history.operations["c2"], id="c3", begun=99.0, last_begun=99.0, ended=99.5
    )


def duplicate_number(history: History) -> None:
    event = next(e for e in history.events if e.key.endswith("versions/00000001"))
    again = models_pb2.ModelVersion.FromString(event.value or b"")
    again.labels["op"] = "else"
    history.events.append(Event(history.revision + 1, event.key, again.SerializeToString()))


def gap_in_numbers(history: History) -> None:
    last = next(e for e in history.events if e.key.endswith("versions/00000002"))
    history.events.append(Event(history.revision + 1, last.key.replace("02", "04"), last.value))


def happened_twice(history: History) -> None:
    event = next(e for e in history.events if "clients" in e.key)
    history.events.append(replace(event, revision=history.revision + 1))


def refused_and_done(history: History) -> None:
    history.operations["r3"].outcome = Outcome.FAILED


def refused_when_repeated(history: History) -> None:
    op = history.operations["r2"]
    op.outcome, op.error, op.last_begun = Outcome.UNKNOWN, grpc.StatusCode.ABORTED, 99.0
    history.operations["later"] = replace(history.operations["d1"], begun=100.0, ended=101.0)


def wrong_expectation(history: History) -> None:
    history.operations["r2"].request.expected_revision = 3


def out_of_time(history: History) -> None:
    history.operations["r1"].begun, history.operations["r1"].ended = 90.0, 91.0


def answered_from_before(history: History) -> None:
    history.operations["r3"].response.model.CopyFrom(history.operations["r2"].response.model)


def needless_but_stale(history: History) -> None:
    """A release to the traffic of long ago, acknowledged as if it still were."""
    op = history.operations["r1"]
    history.operations["r4"] = replace(op, id="r4", begun=50.0, last_begun=50.0, ended=51.0)


def torn_release(history: History) -> None:
    without(history, "releases/00000003")


def stage_left_behind(history: History) -> None:
    history.events = [
        e for e in history.events if not (e.revision == 8 and e.key.endswith("stages/00000001"))
    ]


def release_time_goes_back(history: History) -> None:
    at = next(n for n, e in enumerate(history.events) if e.key.endswith("releases/00000002"))
    entry = models_pb2.Release.FromString(history.events[at].value or b"")
    entry.time.FromSeconds(1)
    history.events[at] = replace(history.events[at], value=entry.SerializeToString())


def deleted_twice(history: History) -> None:
    history.set_client("s4", "u")
    history.commit(access__clients__u=None)
    del history.streams["access"]


def delete_that_did_nothing(history: History) -> None:
    history.events = [e for e in history.events if e.value is not None]
    del history.streams["access"]


def out_of_order(history: History) -> None:
    messages = history.streams["access"].messages
    messages[1], messages[2] = messages[2], messages[1]


def order_etcd_did_not_have(history: History) -> None:
    """The changes of two revisions exchanged, with revisions that look right."""
    messages = history.streams["access"].messages
    one, two = messages[1], messages[2]
    messages[1:3] = [replace(two, revision=one.revision), replace(one, revision=two.revision)]


def missed_change(history: History) -> None:
    del history.streams["access"].messages[1]


def missed_the_removal(history: History) -> None:
    stream = history.streams["access"]
    stream.messages[-1] = replace(stream.messages[-1], removed=())


def stale_snapshot(history: History) -> None:
    stream = history.streams["access"]
    client = stream.messages[1]
    stream.messages.append(Message(client.revision, True, client.upserted))


def old_snapshot_as_new(history: History) -> None:
    stream = history.streams["access"]
    stream.messages.append(Message(history.revision, True, stream.messages[2].upserted))


def invented(history: History) -> None:
    client = canonical(access_pb2.Client(name="ghost"))
    history.streams["access"].messages.append(Message(history.revision + 1, False, {"client/ghost": client}))


def another_store(history: History) -> None:
    stream = history.streams["models"]
    stream.messages[-1] = replace(stream.messages[-1], store_id="else")


def no_snapshot(history: History) -> None:
    stream = history.streams["models"]
    stream.messages[0] = replace(stream.messages[0], snapshot=False)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lost_write, "left no trace"),
        (duplicate_number, "versions of m are not 1, 2, 3"),
        (gap_in_numbers, "versions of m are not 1, 2, 3"),
        (happened_twice, "happened 2 times"),
        (refused_and_done, "refused, yet it happened"),
        (refused_when_repeated, "repeated and refused"),
        (wrong_expectation, "followed revision 4, not the one expected"),
        (out_of_time, "outside of"),
        (answered_from_before, "was answered with the model at 6"),
        (needless_but_stale, "left no trace"),
        (torn_release, "is not that of its last release 2"),
        (stage_left_behind, "has traffic on {2}, stages are"),
        (release_time_goes_back, "is not later than the one before"),
        (deleted_twice, "was deleted 2 times, 1 times at most"),
        (delete_that_did_nothing, "left no trace"),
        (out_of_order, "differs from etcd in"),
        (order_etcd_did_not_have, "differs from etcd in ['client/u', 'client/v']"),
        (missed_change, "differs from etcd in ['client/v']"),
        (missed_the_removal, "differs from etcd in ['client/u']"),
        (stale_snapshot, "comes after revision"),
        (old_snapshot_as_new, "differs from etcd in ['client/u', 'client/v']"),
        (invented, "is beyond etcd's last revision"),
        (another_store, "several stores"),
        (no_snapshot, "no snapshot"),
    ],
)
def test_each_bad_history_is_found(history: History, spoil: Callable[[History], None], said: str) -> None:
    spoil(history)
    found = history.problems()
    assert any(said in problem for problem in found), found
