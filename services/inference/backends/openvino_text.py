"""OpenVINO GenAI's continuous batching as an engine's runtime: paged attention, prefix caching, grammars."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as og

from services.inference.artifact import TextSpec
from services.inference.backends.jobs import (
    NOTHING,
    Finish,
    Grammar,
    GrammarKind,
    Handle,
    Job,
    Output,
    Sampling,
)
from services.inference.backends.partials import Partials

STEP_TOKENS = 256  # of prompts and streams together

_RUNNING = og.GenerationStatus.RUNNING
_REASONS = og.GenerationFinishReason
_FINISHES = {
    _REASONS.STOP: Finish.STOP,
    _REASONS.LENGTH: Finish.LENGTH,
    _REASONS.TOOL_CALL: Finish.STOP,
}


class OpenVinoText:
    """A pipeline on the CPU. `kv_cache_gib` is memory for all sequences together, `max_sequences` how many of
    them a step computes at most.

    The pipeline is given no more prompts than its next step computes. One that it has begun is computed to
    its end even if nobody wants it any more: given up half way, it would leave blocks in the prefix cache
    that count as whole and are not, and the next prompt that begins alike would be answered wrongly (seen
    in 2026.4.1). For what may not be computed side by side see partials.py."""

    def __init__(
        self,
        folder: Path,
        spec: TextSpec,
        kv_cache_gib: int,
        max_sequences: int,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._eos = set(spec.eos_token_ids)
        self._log = log
        scheduler = og.SchedulerConfig()
        scheduler.cache_size = kv_cache_gib
        scheduler.max_num_seqs = max_sequences
        scheduler.max_num_batched_tokens = STEP_TOKENS
        scheduler.enable_prefix_caching = True
        self._pipeline = og.ContinuousBatchingPipeline(str(pipeline_path(folder, spec)), scheduler, "CPU")
        self._partials = Partials()
        self._waiting: deque[_Sequence] = deque()
        self._prompts: list[_Sequence] = []  # that the pipeline is computing

    def add(self, number: int, job: Job) -> Handle:
        sequence = _Sequence(number, job, self._partials, self._eos)
        self._waiting.append(sequence)
        return sequence

    def step(self) -> None:
        if self._waiting:
            self._begin()
        self._pipeline.step()
        if self._prompts:
            self._prompts = [sequence for sequence in self._prompts if not sequence.is_computed()]

    def displaced(self) -> Sequence[tuple[int, Job]]:
        return ()

    def cache(self) -> float:
        return float(self._pipeline.get_metrics().cache_usage) / 100

    def _begin(self) -> None:
        """Give the pipeline of what waits, in order, as much as a step computes."""
        room = STEP_TOKENS - sum(len(sequence.job.input_ids) for sequence in self._prompts)
        later: list[_Sequence] = []
        while self._waiting and room > 0:
            sequence = self._waiting.popleft()
            if sequence.is_over():
                continue
            if not self._partials.claim(sequence.number, sequence.job.input_ids):
                later.append(sequence)
                continue
            try:
                sequence.begin(self._pipeline)
            except Exception as err:
                self._log(f"job refused by the engine: {err!r}")
                continue
            self._prompts.append(sequence)
            room -= len(sequence.job.input_ids)
        self._waiting.extendleft(reversed(later))


class _Reader:
    """Takes from the pipeline's handle of a sequence. Between two steps no code is in the processor's cache:
    there each of the pipeline's enumerations costs 20 to 30 µs, so that it is asked for only where a sequence
    may have ended."""

    def __init__(self, sampling: Sampling, eos: Set[int]) -> None:
        self._left = sampling.max_tokens
        self._logprobs = sampling.logprobs
        self._eos = eos
        self._is_told = False

    def read(self, handle: Any) -> Output:
        if not handle.can_read():
            return self._end(handle)
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = Finish.NONE
        while True:
            for output in handle.read().values():
                new = output.generated_ids
                tokens += new
                if self._logprobs:
                    logprobs += output.generated_log_probs
                self._left -= len(new)
                if self._left <= 0 or not new or new[-1] in self._eos:
                    finish = _FINISHES.get(output.finish_reason, Finish.NONE)
            if not handle.can_read():
                self._is_told |= bool(finish)
                return Output(tokens, logprobs, finish)

    def _end(self, handle: Any) -> Output:
        """Of a sequence with nothing to read, told once."""
        status = handle.get_status()
        if status == _RUNNING or self._is_told:
            return NOTHING
        self._is_told = True
        # Dropped without a reason: the KV cache cannot hold the sequence.
        is_whole = status == og.GenerationStatus.FINISHED
        return Output(finish=Finish.STOP if is_whole else Finish.REFUSED)


class _Sequence:
    """The engine's Handle of a sequence, from when it waits for its turn."""

    def __init__(self, number: int, job: Job, partials: Partials, eos: Set[int]) -> None:
        self.job = job
        self.number = number
        self._partials = partials
        self._config = generation_config(job.sampling, eos)
        self._reader = _Reader(job.sampling, eos)
        self._handle: Any = None  # the pipeline's, as soon as it has one
        self._is_refused = self._is_cancelled = self._is_told = self._is_computed = False

    def begin(self, pipeline: og.ContinuousBatchingPipeline) -> None:
        """Raises what the pipeline does of a job that it refuses."""
        ids = openvino.Tensor(np.array([self.job.input_ids], dtype=np.int64))
        try:
            self._handle = pipeline.add_request(self.number, ids, self._config)
        except Exception:
            self._is_refused = True
            self._partials.ended(self.number)
            raise

    def is_computed(self) -> bool:
        """Whether the prompt is, or never will be; asked after each step until then."""
        running = self._handle.get_status() == _RUNNING
        self._is_computed = bool(self._handle.can_read()) or not running
        if self._is_computed and self._is_cancelled:
            self._leave()
        return self._is_computed

    def take(self) -> Output:
        if self._handle is None:
            made = Output(finish=Finish.REFUSED) if self._is_refused else NOTHING
        else:
            made = self._reader.read(self._handle)
            self._partials.grew(self.number, made.tokens)
        if made.finish:
            self._is_told = True
            self._partials.ended(self.number)
        return made

    def is_over(self) -> bool:
        return self._is_told or self._is_cancelled

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._handle is None:
            self._partials.ended(self.number)
        elif self._is_computed:
            self._leave()

    def _leave(self) -> None:
        self.take()
        self._handle.cancel()
        self._partials.ended(self.number)


def pipeline_path(folder: Path, spec: TextSpec) -> Path:
    """What a pipeline is opened with: a GGUF file, or the folder of an OpenVINO model."""
    weights = folder / spec.weights
    return weights if weights.suffix == ".gguf" else weights.parent


def generation_config(sampling: Sampling, eos: Set[int]) -> og.GenerationConfig:
    config = og.GenerationConfig()
    config.max_new_tokens = sampling.max_tokens
    config.eos_token_id = min(eos, default=-1)
    config.stop_token_ids = set(eos)
    config.repetition_penalty = sampling.repetition_penalty
    config.presence_penalty = sampling.presence_penalty
    config.frequency_penalty = sampling.frequency_penalty
    config.logprobs = int(sampling.logprobs)
    config.do_sample = sampling.temperature > 0
    if config.do_sample:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        config.min_p = sampling.min_p
        config.rng_seed = sampling.seed
        if sampling.top_k:
            config.top_k = sampling.top_k
    if sampling.grammar is not None:
        config.structured_output_config = structured_output(sampling.grammar)
    return config


def structured_output(grammar: Grammar) -> og.StructuredOutputConfig:
    if grammar.kind == GrammarKind.JSON_SCHEMA:
        return og.StructuredOutputConfig(json_schema=grammar.text)
    return og.StructuredOutputConfig(regex=grammar.text)
