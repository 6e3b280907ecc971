"""The verdict on a run: pure, over etcd's history and what clients and watchers have recorded."""

from __future__ import annotations

from collections.abc import Iterator

from tests.histories import invariants, writes
from tests.histories.records import Operation, Stream
from tests.histories.truth import Truth
from tests.histories.views import State, Timeline, timelines


def problems(truth: Truth, operations: list[Operation], streams: list[Stream]) -> list[str]:
    """All that is wrong; of each stream the first thing only."""
    known = timelines(truth)
    found = [*invariants.problems(truth), *writes.problems(truth, operations, streams)]
    for stream in streams:
        problem = next(misled(stream, known[stream.view], truth.last), None)
        if problem:
            found.append(f"{stream.name}: {problem}")
    return found


def misled(stream: Stream, timeline: Timeline, last: int) -> Iterator[str]:
    """After every message, what the watcher has folded is etcd's state at the message's revision, and that
    never goes backward: so it saw no order etcd did not have, missed nothing, and nothing was invented."""
    state: State = {}
    revision = 0
    store_ids = {message.store_id for message in stream.messages}
    if len(store_ids) > 1:
        yield f"was told of several stores: {store_ids}"
    for number, message in enumerate(stream.messages):
        where = f"message {number} at revision {message.revision}"
        if not number and not message.snapshot:
            yield f"{where} is the first one and no snapshot"
        if message.revision < revision:
            yield f"{where} comes after revision {revision}"
        if message.revision > last:
            yield f"{where} is beyond etcd's last revision {last}"
        if unknown := set(message.removed) - set(state):
            yield f"{where} removes what was not there: {unknown}"
        if message.snapshot:
            state = {}
        state = {**{k: v for k, v in state.items() if k not in message.removed}, **message.upserted}
        revision = message.revision
        truth = timeline.at(revision)
        if state != truth:
            wrong = {name for name in state.keys() | truth.keys() if state.get(name) != truth.get(name)}
            yield f"{where} differs from etcd in {sorted(wrong)}"
