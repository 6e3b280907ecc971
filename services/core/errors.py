"""What can go wrong, in the suite's own words, and the one table that turns it into gRPC statuses.

Code below the edge raises these; `StatusMapper` (interceptors.py) answers them. Clients branch on the
status code and on `google.rpc.ErrorInfo.reason`, never on the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "lingqu"


class LingquError(Exception):
    """Base of all errors with a meaning for the caller. `retry_after_s` is set where waiting helps;
    `metadata` is what ErrorInfo says besides the reason."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"
    retry_after_s: float | None = None
    metadata: Mapping[str, str] = MappingProxyType({})


class AlreadyExists(LingquError):
    """Somebody else has that name, and goes on having it."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class InvalidInput(LingquError):
    """The caller's request is wrong; `field` is the path of the field in the request message."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class WrongTask(InvalidInput):
    """The model named exists, but does another task."""

    reason = "WRONG_TASK"


class Unsupported(InvalidInput):
    """The field is well-formed, but this model or its engine cannot do it."""

    reason = "UNSUPPORTED"


class NotFound(LingquError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class ModelNotFound(NotFound):
    reason = "MODEL_NOT_FOUND"

    def __init__(self, model: str) -> None:
        super().__init__(f'model "{model}" does not exist or takes no traffic')


class VersionNotServed(NotFound):
    """The model takes traffic, but not the version of it that was asked for by number or name."""

    reason = "VERSION_NOT_SERVED"

    def __init__(self, model: str, version: str) -> None:
        super().__init__(
            f'version "{version}" of model "{model}" is not served: there is none of that number or name, '
            "it is retired, or no replica has it ready"
        )


class LeaseExpired(NotFound):
    """The instance's lease is gone: it has to register again."""

    reason = "LEASE_EXPIRED"


class Conflict(LingquError):
    """Somebody else changed the same thing first; reading it again and retrying is safe."""

    code = grpc.StatusCode.ABORTED
    reason = "CONFLICT"


class NotReady(LingquError):
    """What the request needs has not happened yet."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NOT_READY"


class WrongStage(NotReady):
    """A version's stage does not allow it."""

    reason = "WRONG_STAGE"


class BelowThreshold(NotReady):
    """An evaluation figure is not what the model's policy asks."""

    reason = "BELOW_THRESHOLD"


class TooSoon(NotReady):
    """The model's policy wants more time between two releases."""

    reason = "TOO_SOON"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RolloutRunning(NotReady):
    """A rollout of the model is in progress; it has to end first."""

    reason = "ROLLOUT_RUNNING"


class NothingToRollBack(NotReady):
    """The model has had no other traffic before."""

    reason = "NOTHING_TO_ROLL_BACK"


class Occupied(NotReady):
    """There is something already that is not replaced without being told."""

    reason = "OCCUPIED"


class Restoring(NotReady):
    """A restore is in progress, or was interrupted and has to be repeated."""

    reason = "RESTORING"


class Unauthenticated(LingquError):
    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class KeyRevoked(Unauthenticated):
    """The key was taken back."""

    reason = "KEY_REVOKED"


class ClientDisabled(Unauthenticated):
    """None of the client's keys works for the time being."""

    reason = "CLIENT_DISABLED"


class Unimplemented(LingquError):
    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class PermissionDenied(LingquError):
    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class ModelNotAllowed(PermissionDenied):
    """The client, or the key by itself, may call other models only."""

    reason = "MODEL_NOT_ALLOWED"


class UnknownClient(PermissionDenied):
    """The registry has no record of the client, and this suite serves those it knows."""

    reason = "UNKNOWN_CLIENT"


class QueueFull(LingquError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitReached(LingquError):
    """A client or a model uses as much as it may. `limit` is the field of the record (Limits in
    access.proto), `of` whose it is: "client", "model" or "client_model"."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "LIMIT_REACHED"

    def __init__(
        self, message: str, limit: str = "", of: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.metadata = {"limit": limit, "of": of} if limit else {}


class TooManyKeys(LingquError):
    """More keys are alive than are kept account of."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_KEYS"


class MessageTooLarge(LingquError):
    """Larger than is read; trying again does not help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class SlowWatcher(LingquError):
    """A watcher fell so far behind that its buffer filled; it should watch again from a snapshot."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_WATCHER"
    retry_after_s = 0.1


class BackendUnavailable(LingquError):
    """Something we depend on is away. Nothing was changed; trying again later is safe."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "BACKEND_UNAVAILABLE"
    retry_after_s: float | None = 1.0


class Stopping(BackendUnavailable):
    """This process ends; another one answers, or its successor."""

    reason = "STOPPING"
    retry_after_s = 0.1

    def __init__(self) -> None:
        super().__init__("this process stops; call again, another one will answer")


class BreakerOpen(BackendUnavailable):
    """Too many requests to the model have failed or taken too long; it is given time."""

    reason = "BREAKER_OPEN"
    retry_after_s = 2.0


class OutcomeUnknown(LingquError):
    """A change was sent and not confirmed: it may have been made."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "OUTCOME_UNKNOWN"
    retry_after_s = 1.0

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; trying again is safe, with the same request id where the call has one")


class StoreReplaced(LingquError):
    """etcd was wiped or restored from a backup: what a watcher was told before does not hold any more."""

    code = grpc.StatusCode.ABORTED
    reason = "STORE_REPLACED"
    retry_after_s = 0.1


class StoreFull(LingquError):
    """etcd has reached its space quota: it answers reads and deletes, and refuses to write."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "STORE_FULL"

    def __init__(self) -> None:
        super().__init__(
            "etcd's space quota is used up: compact its history (etcdctl compact), defragment each member "
            "(etcdctl defrag), then disarm the alarm (etcdctl alarm disarm); reads go on meanwhile"
        )


class DeadlinePassed(LingquError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


def to_rpc_status(error: LingquError) -> status_pb2.Status:
    """The error as `google.rpc.Status` with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    details = [_pack(info)]
    if isinstance(error, InvalidInput):
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.field, description=error.description)
        details.append(_pack(bad))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code.value[0], message=str(error), details=details)


def _pack(message: error_details_pb2.ErrorInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)  # or an answer of Envoy's would differ between control planes
    return packed
