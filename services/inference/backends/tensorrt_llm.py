"""TensorRT-LLM's LLM API as the pipeline of Engine (engine.py): text on NVIDIA GPUs, in fp16.

Its own scheduler batches and steps; here its asynchronous results become what Engine polls: handles that have
something to read, and a `step` that waits until one has. Written against tensorrt_llm.LLM of 1.x
(https://nvidia.github.io/TensorRT-LLM/llm-api); not run on a GPU yet. The module is handed in, so that the
mapping is tested without it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.inference.backends.jobs import Finish, GrammarKind, Job, Output, Sampling

WAIT_S = 0.005  # of a step without news; commands wait as long at most
_FINISHED = {"stop": Finish.STOP, "length": Finish.LENGTH}  # whatever else: "timeout", "cancelled"


@dataclass(slots=True)
class TensorRtHandle:
    """A sequence. Filled by the loop's thread, read by the engine's."""

    _loop: asyncio.AbstractEventLoop
    _outputs: deque[Output] = field(default_factory=deque)
    _ended: bool = False
    _told: bool = False
    _result: Any = None
    _cancelled: bool = False
    _sent: int = 0

    def take(self) -> Output:
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = Finish.NONE
        while self._outputs:
            output = self._outputs.popleft()
            tokens += output.tokens
            logprobs += output.logprobs
            finish = output.finish
        self._told |= bool(finish)
        return Output(tokens, logprobs, finish)

    def cancel(self) -> None:
        """After the step that is running."""
        self._cancelled = True
        self._loop.call_soon_threadsafe(self.abort)

    def is_over(self) -> bool:
        return self._told or self._cancelled

    def abort(self) -> None:
        """In the loop's thread."""
        if self._result is not None and not self._ended:
            self._result.abort()

    def begin(self, result: Any) -> None:
        self._result = result
        if self._cancelled:  # before it had begun
            result.abort()

    def push(self, completion: Any) -> None:
        """What a completion has more than last time."""
        tokens = [int(token) for token in completion.token_ids[self._sent :]]
        found = list(completion.logprobs or ())[self._sent :]
        self._sent += len(tokens)
        finish = _FINISHED.get(completion.finish_reason, Finish.NONE)
        if tokens or finish:
            logprobs = [_logprob(one, token) for one, token in zip(found, tokens, strict=False)]
            self._outputs.append(Output(tokens, logprobs, finish))
        self._ended |= bool(finish)

    def fail(self) -> None:
        """It ended without a reason of the table."""
        if not self._ended:
            self._outputs.append(Output(finish=Finish.FAILED))
            self._ended = True


class TensorRtPipeline:
    """`module` is tensorrt_llm, `llm` its LLM. Owns a thread with the event loop that LLM's results need."""

    def __init__(self, module: Any, llm: Any, eos_token_ids: Sequence[int]) -> None:
        self._module = module
        self._llm = llm
        self._eos = list(eos_token_ids)
        self._news = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tensorrt-llm", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Wait until a sequence has something to read, but not for long."""
        self._news.wait(WAIT_S)
        self._news.clear()

    def displaced(self) -> Sequence[tuple[int, Job]]:
        return ()

    def cache(self) -> None:
        """The executor's own statistics have it; they come with a delay and only if they are asked for."""

    def add(self, number: int, job: Job) -> TensorRtHandle:
        """Raises ValueError for a job that the engine refuses."""
        parameters = self.parameters(job.sampling)
        handle = TensorRtHandle(self._loop)
        asyncio.run_coroutine_threadsafe(self._generate(list(job.input_ids), parameters, handle), self._loop)
        return handle

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._llm.shutdown()

    def parameters(self, sampling: Sampling) -> Any:
        """Its SamplingParams of ours."""
        given: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "end_id": self._eos[0] if self._eos else None,
            "stop_token_ids": self._eos[1:] or None,
            "detokenize": False,
            "add_special_tokens": False,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
        }
        if sampling.temperature > 0:
            given |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or None,
                "min_p": sampling.min_p or None,
                "seed": sampling.seed,
            }
        else:
            given["top_k"] = 1  # greedy
        if sampling.logprobs:
            given["logprobs"] = 1
        if sampling.grammar is not None:
            kind = "json" if sampling.grammar.kind == GrammarKind.JSON_SCHEMA else "regex"
            guided = self._module.llmapi.GuidedDecodingParams(**{kind: sampling.grammar.text})
            given["guided_decoding"] = guided
        return self._module.SamplingParams(**given)

    async def _generate(self, ids: list[int], parameters: Any, handle: TensorRtHandle) -> None:
        try:
            result = self._llm.generate_async(ids, sampling_params=parameters, streaming=True)
            handle.begin(result)
            async for output in result:
                handle.push(output.outputs[0])
                self._news.set()
        finally:  # whatever it was, the sequence ended
            handle.fail()
            self._news.set()


def open_pipeline(
    module: Any,
    folder: Path,
    eos_token_ids: Sequence[int],
    context_tokens: int,
    max_sequences: int,
    cache_tokens: int | None = None,
) -> TensorRtPipeline:
    """Load the Hugging Face checkpoint in `folder`, in fp16. `cache_tokens` bounds the KV cache: left to
    itself the engine takes nine tenths of what is free, and nothing can be loaded beside it."""
    llm = module.LLM(
        model=str(folder),
        dtype="float16",
        max_batch_size=max_sequences,
        max_seq_len=context_tokens,
        guided_decoding_backend="xgrammar",
        kv_cache_config=module.llmapi.KvCacheConfig(enable_block_reuse=True, max_tokens=cache_tokens),
    )
    return TensorRtPipeline(module, llm, eos_token_ids)


def _logprob(found: Any, token: int) -> float:
    """Of a chosen token: a number, or a value by token."""
    if isinstance(found, dict):
        found = found[token]
    return float(getattr(found, "logprob", found))
