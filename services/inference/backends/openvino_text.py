"""OpenVINO GenAI's continuous batching as an engine's runtime: paged attention, prefix caching, grammars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as og

from services.inference.artifact import TextSpec
from services.inference.backends.engine import Grammar, GrammarKind, Handle, Job, Sampling


class OpenVinoText:
    """A pipeline on the CPU. `kv_cache_gib` is memory for all sequences together, `max_sequences` how many of
    them a step computes at most."""

    def __init__(self, folder: Path, spec: TextSpec, kv_cache_gib: int, max_sequences: int) -> None:
        self._eos = set(spec.eos_token_ids)
        scheduler = og.SchedulerConfig()
        scheduler.cache_size = kv_cache_gib
        scheduler.max_num_seqs = max_sequences
        scheduler.enable_prefix_caching = True
        self._pipeline = og.ContinuousBatchingPipeline(str(pipeline_path(folder, spec)), scheduler, "CPU")

    def add(self, number: int, job: Job) -> Handle:
        ids = openvino.Tensor(np.array([job.input_ids], dtype=np.int64))
        handle: Any = self._pipeline.add_request(number, ids, generation_config(job.sampling, self._eos))
        return handle  # type: ignore[no-any-return]

    def step(self) -> None:
        self._pipeline.step()


def pipeline_path(folder: Path, spec: TextSpec) -> Path:
    """What a pipeline is opened with: a GGUF file, or the folder of an OpenVINO model."""
    weights = folder / spec.weights
    return weights if weights.suffix == ".gguf" else weights.parent


def generation_config(sampling: Sampling, eos: set[int]) -> og.GenerationConfig:
    config = og.GenerationConfig()
    config.max_new_tokens = sampling.max_tokens
    config.eos_token_id = min(eos, default=-1)
    config.stop_token_ids = eos
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
