"""What inference and the text model in Triton say to each other, on top of the Open Inference Protocol.

One stream from an inference process carries all its sequences, so that a step of the engine costs one
message however many sequences it advanced. A request on that stream has one BYTES tensor `session`,
holding JSON; `id` names the session, `secret` (left out below) proves that inference speaks: any client
may send tensors to the model, but only inference may speak for many clients.

    {"op": "open", "id": "…", "line": "…"}         answered by `step` tensors until the stream ends, or by
                                                   their rows on the line, where it can be reached (line.py)
    {"op": "batch", "id": "…", "commands": […]}    answered once, by `text_output`: {"7": "its error"}, of
        {"op": "submit", "key": 7, "input_ids": […], "sampling": {…}, "traceparent": "00-…"}
        {"op": "cancel", "key": 7}
    {"op": "score", "id": "…", "key": 8, "input_ids": […]}    answered by `logprobs`, FP32 [tokens - 1], and
                                                   before, while it takes long, by empty `text_output`
    {"op": "stats", "id": ""}                      answered by `text_output`: jobs.Counts as JSON

While it steps, the engine lets next to nothing else run in its process: about one request is taken a step.
That is why inference sends what has come meanwhile as one batch.

`step` is INT32 [n, 4]: rows of (key, token id or NO_TOKEN, Finish, bits of the FP32 log-probability). Without
rows it says that the engine works.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.inference.backends.jobs import Finish, Grammar, GrammarKind, Job, Sampling

SESSION = "session"
STEP = "step"
BYTES_PREFIX = 4  # of a string in a BYTES tensor: its length
LOGPROBS = "logprobs"
COLUMNS = 4
NO_TOKEN = -1
MAX_KEY = 2**31 - 1  # `step` is INT32

_FLOAT, _INT, _ROW = struct.Struct("<f"), struct.Struct("<i"), struct.Struct(f"<{COLUMNS}i")


def rows(key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float]) -> bytes:
    """What a step made for one sequence, as the tensor has it."""
    packed = b""
    for index, token in enumerate(tokens):
        bits = _INT.unpack(_FLOAT.pack(logprobs[index]))[0] if logprobs else 0
        packed += _ROW.pack(key, token, Finish.NONE, bits)
    if finish:
        packed += _ROW.pack(key, NO_TOKEN, finish, 0)
    return packed


def logprob(bits: int) -> float:
    """The number that `rows` has put into a row."""
    return float(_FLOAT.unpack(_INT.pack(bits))[0])


@dataclass(frozen=True, slots=True)
class Command:
    """One of the requests above; `job` is set for a submit and a score, `parts` for a batch,
    `line` for an open."""

    op: str
    session: str
    secret: str
    key: int = 0
    job: Job | None = None
    traceparent: str = ""
    parts: tuple[Command, ...] = ()
    line: str = ""


def dump(command: Command) -> bytes:
    body = _body(command)
    body["id"], body["secret"] = command.session, command.secret
    return json.dumps(body, separators=(",", ":")).encode()


def _body(command: Command) -> dict[str, Any]:
    body: dict[str, Any] = {"op": command.op, "key": command.key}
    if command.line:
        body["line"] = command.line
    if command.parts:
        body["commands"] = list(map(_body, command.parts))
    if command.job is not None:
        body["input_ids"] = list(command.job.input_ids)
        if command.op == "submit":
            body["sampling"] = asdict(command.job.sampling)
            body["traceparent"] = command.traceparent
    return body


def load(raw: bytes) -> Command:
    """Raises ValueError if `raw` is not what `dump` makes."""
    try:
        body = json.loads(raw)
        return _command(body, str(body["id"]), str(body["secret"]), nested=False)
    except (KeyError, TypeError, AttributeError, OverflowError) as err:
        raise ValueError(f"not a session command: {err!r}") from err


def _command(body: dict[str, Any], session: str, secret: str, *, nested: bool) -> Command:
    op, key = str(body["op"]), int(body.get("key", 0))
    if not 0 <= key <= MAX_KEY:
        raise ValueError(f"key: 0 to {MAX_KEY}")
    job = None
    parts: tuple[Command, ...] = ()
    if op in ("submit", "score"):
        sampling = _sampling(body["sampling"]) if op == "submit" else Sampling(max_tokens=1)
        job = Job(key, [int(i) for i in body["input_ids"]], sampling)
    elif op == "batch" and not nested:
        parts = tuple(_command(part, session, secret, nested=True) for part in body["commands"])
    traceparent, line = str(body.get("traceparent", "")), str(body.get("line", ""))
    return Command(op, session, secret, key, job, traceparent, parts, line)


def _sampling(body: dict[str, Any]) -> Sampling:
    grammar = body.pop("grammar", None)
    if grammar is not None:
        grammar = Grammar(GrammarKind(grammar["kind"]), str(grammar["text"]))
    return Sampling(**body, grammar=grammar)
