"""Who has changed what: one line of JSON for each administrative act, in files that are bounded.

    {"time": "2026-11-25T03:04:05.678Z", "service": "lingqu.gateway.v1.GatewayService", "method": "CreateKey",
     "client": "dev", "key_id": "3f0c…", "peer": "ipv4:127.0.0.1:40312", "request": {"client": "alice"},
     "outcome": "OK", "reason": "", "took_ms": 3.1, "key_id_made": "…"}

Acts are all calls but those that read and those that parts of the suite make all the time. Requests hold no
secrets, and answers, which may, are not written; what is to be known of an answer is said with `note`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from services.core.errors import LingquError
from services.core.identity import Caller
from services.core.interceptors import Context, Layer

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 16 << 20
FILES = 8
MAX_REQUEST_BYTES = 4_096
# What reads, and what parts of the suite do by themselves, many times a second.
_UNTOLD = (
    "Get", "List", "Watch", "Describe", "KeepAlive", "RegisterInstance", "DeregisterInstance", "RecordKey",
    "Query", "Tail",
)  # fmt: skip
_SERVICES = "lingqu."
_OF_PARTS = ("lingqu.registry.v1.LedgerService", "lingqu.gateway.v1.LimiterService")

_notes: ContextVar[dict[str, str] | None] = ContextVar("notes", default=None)


def note(**facts: str) -> None:
    """Add to the line of the act that is in progress, if one is written; nothing secret."""
    notes = _notes.get()
    if notes is not None:
        notes.update({f"made_{name}": value for name, value in facts.items()})


class AuditLog:
    """Lines in `path`; a full file is set aside as `path`.1, .2 and so on, the oldest is dropped. A line that
    cannot be written goes to the service's own log."""

    def __init__(self, path: Path, max_bytes: int = MAX_FILE_BYTES, files: int = FILES) -> None:
        """Raises OSError if nothing can be written there."""
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)

    def write(self, line: dict[str, Any]) -> None:
        raw = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        try:
            if self._path.exists() and self._path.stat().st_size + len(raw) > self._max_bytes:
                self._set_aside()
            with self._path.open("ab") as file:
                self._path.chmod(0o600)
                file.write(raw)
        except OSError:
            log.exception("the audit log cannot be written; lost: %s", raw.decode())

    def _set_aside(self) -> None:
        for number in range(self._files - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            if newer.exists():
                newer.replace(older)


def audited(path: Path | None, who: Callable[[Iterable[tuple[str, Any]]], Caller]) -> tuple[Layer, ...]:
    """The layer for `server_stack`, if an audit log is wanted. Raises OSError."""
    return (Audit(AuditLog(path), who),) if path is not None else ()


class Audit(Layer):
    """Writes the acts. `who` identifies a caller by its metadata and raises what is wrong with it."""

    def __init__(self, written: AuditLog, who: Callable[[Iterable[tuple[str, Any]]], Caller]) -> None:
        self._log = written
        self._who = who

    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        return self.handled(method, None, context)

    @asynccontextmanager
    async def handled(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        service, _, rpc = method.lstrip("/").partition("/")
        if not service.startswith(_SERVICES) or service in _OF_PARTS or rpc.startswith(_UNTOLD):
            yield
            return
        begun = time.monotonic()
        notes: dict[str, str] = {}
        token = _notes.set(notes)
        outcome, reason = "OK", ""
        try:
            yield
        except LingquError as error:
            outcome, reason = error.code.name, error.reason
            raise
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except Exception:
            outcome = "INTERNAL"
            raise
        finally:
            _notes.reset(token)
            client, key_id = self._caller(context)
            self._log.write(
                {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                    "service": service,
                    "method": rpc,
                    "client": client,
                    "key_id": key_id,
                    "peer": context.peer(),
                    "request": _told(request),
                    "outcome": outcome,
                    "reason": reason,
                    "took_ms": round((time.monotonic() - begun) * 1000, 1),
                    **notes,
                }
            )

    def _caller(self, context: Context) -> tuple[str, str]:
        try:
            caller = self._who(context.invocation_metadata() or ())
        except LingquError:
            return "", ""
        return caller.client, caller.key_id


def _told(request: Any) -> Any:
    """The request as JSON, cut off where it is long; of a stream of requests nothing."""
    if not isinstance(request, Message):
        return None
    body = MessageToDict(request, preserving_proto_field_name=True)
    text = json.dumps(body, ensure_ascii=False)
    return body if len(text) <= MAX_REQUEST_BYTES else text[:MAX_REQUEST_BYTES] + "…"
