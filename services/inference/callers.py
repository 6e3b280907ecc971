"""Who asks, how urgently and until when: what of a request decides about its place in the queue."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from services.core.errors import InvalidInput, ModelNotFound
from services.core.interceptors import SHADOW_HEADER, Context

CLIENT_HEADER = "x-lingqu-client"
MODEL_HEADER = "x-lingqu-model"
VERSION_HEADER = "x-lingqu-model-version"
# The model that the gateway has answer in place of the one that was asked for.
FALLBACK_HEADER = "x-lingqu-fallback"
MAX_PRIORITY_HEADER = "x-lingqu-max-priority"
# What a request that may be copied and its copy have in common; others have none.
PAIR_HEADER = "x-lingqu-pair"


class Priority(IntEnum):
    """Who is served first; the numbers are those of inference.proto."""

    INTERACTIVE = 1
    NORMAL = 2
    BATCH = 3


@dataclass(frozen=True, slots=True)
class Caller:
    """`client` is the name in the key, as the gateway has verified it; empty for who came without a gateway.
    `deadline` is a time of time.monotonic(), None where the caller set none. `pair` is
    what a request that may be copied has in common with its copy, which is for a version in the shadow."""

    client: str = ""
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    pair: str = ""
    copy: bool = False

    @property
    def remaining(self) -> float | None:
        """Seconds that are left; 0 when there are none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def caller(context: Context, priority: int) -> Caller:
    """The caller of an RPC. An unknown priority is the normal one, as an unset one is; the gateway may say
    how urgent the client's requests are at most."""
    metadata: Mapping[str, object] = dict(context.invocation_metadata() or ())
    left = context.time_remaining()
    return Caller(
        client=str(metadata.get(CLIENT_HEADER, ""))[:128],
        priority=capped(
            Priority(priority) if priority in Priority.__members__.values() else Priority.NORMAL, metadata
        ),
        deadline=None if left is None else time.monotonic() + left,
        pair=str(metadata.get(PAIR_HEADER, ""))[:128],
        copy=SHADOW_HEADER in metadata,
    )


def capped(priority: Priority, headers: Mapping[str, object]) -> Priority:
    """No more urgent than the gateway says."""
    most = str(headers.get(MAX_PRIORITY_HEADER, ""))
    return max(priority, Priority(int(most))) if most in ("1", "2", "3") else priority


def answering(name: str, headers: Mapping[str, object]) -> str:
    """The model that answers a request for `name`: that one, unless the gateway says another."""
    return str(headers.get(FALLBACK_HEADER) or name)


def routed_version(name: str, headers: Mapping[str, object]) -> str:
    """The version that the gateway has chosen for a REST request which names model `name`; empty without a
    gateway. Which models a client may call is decided by what the gateway has read: raises InvalidInput where
    that is another name, and ModelNotFound where it knows no such model."""
    read = headers.get(MODEL_HEADER)
    if read is None and CLIENT_HEADER in headers:
        raise ModelNotFound(name)
    if read is not None and read != name.partition("@")[0]:
        raise InvalidInput("model", "was read otherwise by the gateway: name it once, in well-formed JSON")
    return str(headers.get(VERSION_HEADER, ""))
