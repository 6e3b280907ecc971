"""etcd's own history: every value that every key has had, by revision. The judge of what a registry says."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grpc
from etcd3aio import _protobuf as etcd

EVERY_KEY = b"\0"  # as a key and as the end of a range: all there are


@dataclass(frozen=True, slots=True)
class Event:
    """What a revision made of a key; `value` is None where it was deleted."""

    revision: int
    key: str
    value: bytes | None
    lease: int = 0


class Truth:
    """Events in the order of their revisions."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = tuple(events)
        self.last = self.events[-1].revision if self.events else 0
        self._of: defaultdict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            self._of[event.key].append(event)
        self._revisions = {key: [e.revision for e in events] for key, events in self._of.items()}

    def under(self, prefix: str) -> list[Event]:
        return [event for event in self.events if event.key.startswith(prefix)]

    def by_revision(self) -> Iterator[tuple[int, list[Event]]]:
        for revision, events in itertools.groupby(self.events, lambda e: e.revision):
            yield revision, list(events)

    def at(self, key: str, revision: int) -> Event | None:
        """The record under `key` as it was at `revision`; None if there was none."""
        before = bisect_right(self._revisions.get(key, []), revision)
        event = self._of[key][before - 1] if before else None
        return event if event is not None and event.value is not None else None

    def between(self, key: str, first: int, last: int) -> list[Event | None]:
        """All that was under `key` from revision `first` to `last`, both included."""
        changes = [e.revision for e in self._of.get(key, []) if first < e.revision <= last]
        return [self.at(key, revision) for revision in (first, *changes)]


async def read(address: str) -> Truth:
    """The whole history of the etcd at `address`, of which nothing may have been compacted."""
    events: list[Event] = []
    async with grpc.aio.insecure_channel(address) as channel:
        newest = (await etcd.KVStub(channel).Range(etcd.RangeRequest(key=b"x"), timeout=5)).header.revision
        create = etcd.WatchCreateRequest(key=EVERY_KEY, range_end=EVERY_KEY, start_revision=1)
        call = etcd.WatchStub(channel).Watch()
        await call.write(etcd.WatchRequest(create_request=create))
        while not events or events[-1].revision < newest:
            answer = await call.read()
            assert not answer.canceled, answer
            events += [
                Event(
                    e.kv.mod_revision,
                    e.kv.key.decode(),
                    None if e.type == e.DELETE else e.kv.value,
                    e.kv.lease,
                )
                for e in answer.events
            ]
        call.cancel()
    return Truth(events)
