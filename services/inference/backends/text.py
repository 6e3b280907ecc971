"""The text model inside Triton: an engine with continuous batching, fed from two kinds of requests.

- Sessions (wire.py): what the inference service uses.
- Plain Open Inference Protocol requests, for any client: `text_input` (BYTES [1], taken as it is) and
  optionally `sampling_parameters` (BYTES [1], JSON with max_tokens, temperature, top_p, top_k, min_p, seed
  and the penalties), as Triton's vLLM backend names them; answered by `text_output` and `output_ids` until
  the final response.
"""

from __future__ import annotations

import gc
import hmac
import json
import queue
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from services.inference.artifact import Manifest, TextSpec
from services.inference.backends import wire
from services.inference.backends.engine import Engine
from services.inference.backends.jobs import Job, Sampling, Sink
from services.inference.backends.line import Line
from services.inference.backends.outbox import Outbox
from services.inference.backends.score import Logprobs, Scorer
from services.inference.backends.sinks import FINAL, RequestSink, SessionSink
from services.inference.backends.spans import EngineSpans, forwarded_traceparent
from services.inference.backends.texts import open_text
from services.inference.tokens import Detokenizer

DEFAULT_MAX_TOKENS = 256


class TritonPythonModel:
    """Triton's interface: initialize, execute, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = Manifest.read(folder)
        if manifest.text is None:
            raise pb_utils.TritonModelException("the artifact's manifest describes no text model")
        self._spec: TextSpec = manifest.text
        self._secret = Path(parameters["session_secret_file"]).read_text()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._spans = EngineSpans(parameters.get("otlp_endpoint", ""), config["name"])
        cache, most = int(parameters["kv_cache_gib"]), int(parameters["max_sequences"])
        self._outbox = Outbox()
        log = pb_utils.Logger.log_error
        self._sessions: dict[str, SessionSink] = {}
        self._engine = Engine(
            lambda: open_text(manifest, folder, cache, most, log), log, self._outbox.flush, self._end_sessions
        )
        self._folder = folder
        self._scorer: Scorer | None = None  # with the first text to score
        gc.collect()
        gc.freeze()  # a collection of all there is would come between two steps

    def finalize(self) -> None:
        self._engine.close()
        self._outbox.close()
        if self._scorer is not None:
            self._scorer.close()
        self._spans.close()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                tensor = pb_utils.get_input_tensor_by_name(request, wire.SESSION)
                if tensor is None:
                    self._on_plain(request, sender)
                else:
                    self._on_command(wire.load(tensor.as_numpy().reshape(-1)[0]), sender)
            except (ValueError, RecursionError) as err:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(err))), flags=FINAL)

    def _on_command(self, command: wire.Command, sender: Any) -> None:
        if not hmac.compare_digest(command.secret.encode(errors="replace"), self._secret.encode()):
            raise ValueError('"session" is for the inference service: send "text_input"')
        if command.op == "open":
            sink = SessionSink(sender, self._outbox, self._spans, self._line(command.line))
            self._sessions[command.session] = sink
            return
        if command.op == "stats":
            sender.send(_text_response(json.dumps(asdict(self._engine.counts))), flags=FINAL)
            return
        known = self._sessions.get(command.session)
        if known is None:
            raise ValueError("no such session: open one first")
        if command.op == "score" and command.job is not None:
            self._score(command.job, sender)
        elif command.op == "batch":
            errors: dict[int, str] = {}
            for part in command.parts:
                try:
                    self._obey(part, known)
                except ValueError as err:  # the others are somebody else's
                    errors[part.key] = str(err)
            sender.send(_text_response(json.dumps(errors)), flags=FINAL)
        else:
            raise ValueError(f'unknown command "{command.op}"')

    def _end_sessions(self) -> None:
        """Those whose inference process is gone: Triton lets go of a model, and of the memory it has, when
        all of its requests have ended."""
        for name, sink in list(self._sessions.items()):
            if sink.is_left():
                del self._sessions[name]
                sink.end()

    def _line(self, address: str) -> Line | None:
        """To the inference process that asks; None if it cannot be reached that way."""
        try:
            return Line(address, self._secret) if address else None
        except OSError as err:
            pb_utils.Logger.log_warn(f"tokens take the way through Triton: {err}")
            return None

    def _obey(self, command: wire.Command, sink: SessionSink) -> None:
        """Raises ValueError."""
        if command.op == "submit" and command.job is not None:
            self._check(command.job)
            sink.begin(command.key, command.traceparent, len(command.job.input_ids))
            self._submit(command.job, sink)
        elif command.op == "cancel":
            self._engine.cancel(sink, command.key)
            if self._scorer is not None:
                self._scorer.cancel(command.key)
        else:
            raise ValueError(f'unknown command "{command.op}"')

    def _score(self, job: Job, sender: Any) -> None:
        self._check_ids(job)
        if not 2 <= len(job.input_ids) <= self._spec.context_tokens:
            raise ValueError(f"a text to score has 2 to {self._spec.context_tokens} tokens")
        if self._scorer is None:
            if Path(self._spec.weights).suffix != ".xml":
                raise ValueError("texts are scored with OpenVINO models only: publish the model as one")
            self._scorer = Scorer(self._folder / self._spec.weights)

        def done(logprobs: Logprobs | None, why: str) -> None:
            if logprobs is None:
                answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(why))
            else:
                answer = pb_utils.InferenceResponse([pb_utils.Tensor(wire.LOGPROBS, logprobs)])
            sender.send(answer, flags=FINAL)

        def working() -> None:
            sender.send(_text_response(""))

        try:
            self._scorer.submit(job.key, job.input_ids, done, working)
        except queue.Full as err:
            raise ValueError("too many texts wait to be scored; try again later") from err

    def _on_plain(self, request: Any, sender: Any) -> None:
        text = _string(request, "text_input")
        if text is None:
            raise ValueError('input "text_input" is missing')
        job = Job(0, self._tokenizer.encode(text).ids, _sampling(_string(request, "sampling_parameters")))
        self._check(job)
        traceparent = forwarded_traceparent(request.parameters())
        span = self._spans.start(traceparent, len(job.input_ids))
        self._submit(job, RequestSink(sender, self._outbox, Detokenizer(self._tokenizer), span))

    def _check(self, job: Job) -> None:
        """Raises ValueError."""
        self._check_ids(job)
        if len(job.input_ids) + job.sampling.max_tokens > self._spec.context_tokens:
            raise ValueError(
                f"prompt ({len(job.input_ids)} tokens) and max_tokens ({job.sampling.max_tokens}) "
                f"exceed the context of {self._spec.context_tokens} tokens"
            )

    def _check_ids(self, job: Job) -> None:
        """Raises ValueError. The engine itself would compute nonsense for a token it does not know."""
        if not job.input_ids:
            raise ValueError("the prompt is empty")
        if min(job.input_ids) < 0 or max(job.input_ids) >= self._spec.vocabulary:
            raise ValueError(f"token ids are 0 to {self._spec.vocabulary - 1}")

    def _submit(self, job: Job, sink: Sink) -> None:
        try:
            self._engine.submit(job, sink)
        except queue.Full as err:
            raise ValueError("too many requests wait for the engine; try again later") from err


def _text_response(text: str) -> Any:
    tensor = pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))
    return pb_utils.InferenceResponse([tensor])


def _string(request: Any, name: str) -> str | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    try:
        return str(tensor.as_numpy().reshape(-1)[0].decode())
    except UnicodeDecodeError as err:
        raise ValueError(f'input "{name}" is not UTF-8') from err


def _sampling(raw: str | None) -> Sampling:
    try:
        given = json.loads(raw) if raw else {}
        return Sampling(
            max_tokens=int(given.get("max_tokens", DEFAULT_MAX_TOKENS)),
            temperature=float(given.get("temperature", 0.0)),
            top_p=float(given.get("top_p", 1.0)),
            top_k=int(given.get("top_k", 0)),
            seed=int(given.get("seed", 0)),
            min_p=float(given.get("min_p", 0.0)),
            repetition_penalty=float(given.get("repetition_penalty", 1.0)),
            presence_penalty=float(given.get("presence_penalty", 0.0)),
            frequency_penalty=float(given.get("frequency_penalty", 0.0)),
        )
    except (ValueError, TypeError, AttributeError, OverflowError) as err:
        raise ValueError(f'input "sampling_parameters": {err}') from err
