"""What inference and the text model in Triton say to each other, on top of the Open Inference Protocol.

One stream from an inference process carries all its sequences, so that a step of the engine costs one
message however many sequences it advanced. A request on that stream has one BYTES tensor `session`,
holding JSON; `id` names the session:

    {"op": "open", "id": "…"}                      answered by `step` tensors until the stream ends
    {"op": "submit", "id": "…", "key": 7, "input_ids": […], "sampling": {…}, "traceparent": "00-…"}
    {"op": "cancel", "id": "…", "key": 7}          both answered once, empty or with an error

`step` is INT32 [n, 3]: rows of (key, token id or NO_TOKEN, Finish).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from services.inference.backends.engine import Job, Sampling

SESSION = "session"
STEP = "step"
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Command:
    """One of the three requests above; `job` is set for a submit."""

    op: str
    session: str
    key: int = 0
    job: Job | None = None
    traceparent: str = ""


def dump(command: Command) -> bytes:
    body: dict[str, Any] = {"op": command.op, "id": command.session, "key": command.key}
    if command.job is not None:
        body["input_ids"] = list(command.job.input_ids)
        body["sampling"] = asdict(command.job.sampling)
        body["traceparent"] = command.traceparent
    return json.dumps(body, separators=(",", ":")).encode()


def load(raw: bytes) -> Command:
    """Raises ValueError if `raw` is not what `dump` makes."""
    try:
        body = json.loads(raw)
        op, session, key = str(body["op"]), str(body["id"]), int(body.get("key", 0))
        job = None
        if op == "submit":
            job = Job(key, [int(i) for i in body["input_ids"]], Sampling(**body["sampling"]))
        return Command(op, session, key, job, str(body.get("traceparent", "")))
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"not a session command: {err!r}") from err
