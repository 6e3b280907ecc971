"""What the tests' clients record: each operation with its outcome, each message of a watch."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message as Proto

from lingqu.client import LingquError
from lingqu.registry.v1 import access_pb2, instances_pb2, models_pb2

# What says nothing about whether a change was made, unless a reason says that it was not.
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
# What no operation of these tests may be answered.
FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)


class Outcome(enum.Enum):
    DONE = "acknowledged"
    FAILED = "refused"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Operation:
    """One wish of a client, sent once or, with a request id, until it was answered. `id` is a text of its own
    that the operation leaves in what it writes. Times are of the monotonic clock."""

    id: str
    method: str
    target: str
    request: Any
    begun: float = 0.0
    last_begun: float = 0.0
    ended: float = math.inf
    outcome: Outcome = Outcome.UNKNOWN
    response: Any = None
    error: grpc.StatusCode | None = None
    detail: str = ""

    def begin(self) -> None:
        self.last_begun = time.monotonic()
        self.begun = self.begun or self.last_begun

    def succeed(self, response: Any) -> None:
        self.ended = time.monotonic()
        self.outcome, self.response, self.error = Outcome.DONE, response, None

    def fail(self, err: grpc.aio.AioRpcError, earlier: bool) -> bool:
        """Take a failure; `earlier` tells that an attempt before may have been done. Whether to repeat."""
        self.ended = time.monotonic()
        known = LingquError(err)
        self.error, self.detail = known.code, f"{known.reason}: {known}"
        lost = known.code in (*NO_ANSWER, *FAULTS) and known.reason != "BACKEND_UNAVAILABLE"
        self.outcome = Outcome.UNKNOWN if lost or earlier else Outcome.FAILED
        return known.code in NO_ANSWER

    def __str__(self) -> str:
        asked = " ".join(str(self.request).split())
        return f"{self.method} {self.id} ({self.outcome.value}: {self.detail or 'ok'}; {asked})"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a watch, its items in canonical form."""

    revision: int
    snapshot: bool
    upserted: dict[str, bytes]
    removed: tuple[str, ...] = ()
    store_id: str = ""
    time: float = 0.0


@dataclass(slots=True)
class Stream:
    """All that one watcher was told, over however many calls, of which each resumed where it had left off."""

    view: str
    name: str
    messages: list[Message] = field(default_factory=list)

    @property
    def revision(self) -> int:
        return self.messages[-1].revision if self.messages else 0

    @property
    def store_id(self) -> str:
        return self.messages[-1].store_id if self.messages else ""


def canonical(message: Proto) -> bytes:
    """Equal for equal messages, whatever the order of their maps."""
    return message.SerializeToString(deterministic=True)


def told(answer: Any) -> Message:
    """A response of one of the three watches."""
    match answer:
        case models_pb2.WatchModelsResponse():
            upserted = {model.name: canonical(model) for model in answer.upserted}
            removed = tuple(answer.removed)
        case instances_pb2.WatchInstancesResponse():
            upserted = {instance.id: canonical(instance) for instance in answer.upserted}
            removed = tuple(answer.removed)
        case access_pb2.WatchAccessResponse():
            upserted = {f"client/{client.name}": canonical(client) for client in answer.clients}
            upserted |= {f"key/{key.key_id}": canonical(key) for key in answer.revoked_keys}
            removed = (
                *(f"client/{name}" for name in answer.removed_clients),
                *(f"key/{key}" for key in answer.forgotten_keys),
            )
        case _:
            raise TypeError(answer)
    return Message(answer.revision, answer.snapshot, upserted, removed, answer.store_id, time.monotonic())
