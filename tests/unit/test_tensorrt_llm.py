"""TensorRT-LLM behind our engine, the module faked at the import: what it is asked, and what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.inference.backends.engine import Engine
from services.inference.backends.jobs import Finish, Grammar, GrammarKind, Job, Output, Sampling
from services.inference.backends.tensorrt_llm import TensorRtPipeline, open_pipeline


class Result:
    """A RequestOutput: iterated as tokens come, `outputs[0]` always holding all of them."""

    def __init__(self, script: list[tuple[list[int], str | None]], pause_s: float) -> None:
        self._script = script
        self._pause_s = pause_s
        self.aborted = False
        self.outputs = [SimpleNamespace(token_ids=[], logprobs=[], finish_reason=None)]

    def abort(self) -> None:
        self.aborted = True

    def __aiter__(self) -> Any:
        return self._run()

    async def _run(self) -> Any:
        for tokens, reason in self._script:
            await asyncio.sleep(self._pause_s)
            output = self.outputs[0]
            if self.aborted:
                output.finish_reason = "cancelled"
                yield self
                return
            if reason == "crash":
                raise RuntimeError("CUDA error")
            output.token_ids += tokens
            output.logprobs += [{token: SimpleNamespace(logprob=-token / 10, rank=1)} for token in tokens]
            output.finish_reason = reason
            yield self


class FakeModule:
    """tensorrt_llm: what is asked of it is kept."""

    def __init__(self, script: list[tuple[list[int], str | None]], pause_s: float = 0.001) -> None:
        self.asked: list[tuple[list[int], dict[str, Any], bool]] = []
        self.results: list[Result] = []
        self.opened: dict[str, Any] = {}
        self.llmapi = SimpleNamespace(
            GuidedDecodingParams=lambda **given: ("guided", given), KvCacheConfig=lambda **given: given
        )
        outer = self

        class LLM:
            def __init__(self, **given: Any) -> None:
                outer.opened = given

            def generate_async(self, inputs: list[int], *, sampling_params: Any, streaming: bool) -> Result:
                assert asyncio.get_running_loop(), "its results need one"
                outer.asked.append((inputs, sampling_params, streaming))
                outer.results.append(Result(script, pause_s))
                return outer.results[-1]

            def shutdown(self) -> None: ...

        self.LLM = LLM

    @staticmethod
    def SamplingParams(**given: Any) -> dict[str, Any]:
        return given


class Sink:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish = Finish.NONE

    def gone(self) -> bool:
        return False

    def emit(self, key: int, tokens: Any, finish: Finish, *more: Any) -> None:
        self.tokens += tokens
        self.finish = finish or self.finish

    def step_done(self, running: int) -> None: ...

    def alive(self) -> None: ...


@pytest.fixture
def made() -> Iterator[Callable[[FakeModule], tuple[TensorRtPipeline, Engine]]]:
    opened: list[tuple[TensorRtPipeline, Engine]] = []

    def make(module: FakeModule) -> tuple[TensorRtPipeline, Engine]:
        pipeline = open_pipeline(module, Path("/models/m"), (2, 7), 4096, 64)
        opened.append((pipeline, Engine(lambda: pipeline, lambda text: None)))
        return opened[-1]

    yield make
    for pipeline, engine in opened:
        engine.close()
        pipeline.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_is_opened_in_half_precision_with_our_limits(made: Any) -> None:
    module = FakeModule([])
    made(module)
    assert module.opened["dtype"] == "float16"
    assert (module.opened["max_batch_size"], module.opened["max_seq_len"]) == (64, 4096)


@pytest.mark.parametrize(("reason", "finish"), [("stop", Finish.STOP), ("length", Finish.LENGTH)])
def test_tokens_come_once_each_and_the_reason_last(made: Any, reason: str, finish: Finish) -> None:
    module = FakeModule([([5], None), ([6, 7], None), ([], None), ([8], reason)])
    _, engine = made(module)
    sink = Sink()
    engine.submit(Job(1, [1, 2, 3], Sampling(4)), sink)
    until(lambda: sink.finish != Finish.NONE)
    assert sink.tokens == [5, 6, 7, 8]
    assert sink.finish == finish
    assert module.asked[0][0] == [1, 2, 3]
    assert module.asked[0][2], "streaming"


def test_many_at_once_do_not_mix(made: Any) -> None:
    _, engine = made(FakeModule([([5], None), ([6], "stop")]))
    sinks = [Sink() for _ in range(20)]
    for number, sink in enumerate(sinks):
        engine.submit(Job(number, [1], Sampling(4)), sink)
    until(lambda: all(sink.finish == Finish.STOP for sink in sinks))
    assert all(sink.tokens == [5, 6] for sink in sinks)


def test_a_cancel_aborts_what_runs(made: Any) -> None:
    module = FakeModule([([5], None)] * 1000, pause_s=0.01)
    _, engine = made(module)
    sink = Sink()
    engine.submit(Job(1, [1], Sampling(1000)), sink)
    until(lambda: len(sink.tokens) > 2)
    engine.cancel(sink, 1)
    until(lambda: sink.finish == Finish.CANCELLED)
    until(lambda: module.results[0].aborted)


@pytest.mark.parametrize("script", [[([5], None), ([], "crash")], [([5], "timeout")], [([5], None)]])
def test_what_ends_without_a_reason_has_failed(made: Any, script: Any) -> None:
    _, engine = made(FakeModule(script))
    sink = Sink()
    engine.submit(Job(1, [1], Sampling(4)), sink)
    until(lambda: sink.finish == Finish.FAILED)
    assert sink.tokens == [5]


def test_sampling_is_mapped_field_by_field(made: Any) -> None:
    pipeline, _ = made(FakeModule([]))
    greedy = pipeline.parameters(Sampling(9))
    assert greedy["top_k"] == 1
    assert (greedy["max_tokens"], greedy["end_id"], greedy["stop_token_ids"]) == (9, 2, [7])
    assert not {"temperature", "top_p", "seed", "logprobs", "guided_decoding"} & set(greedy)
    found = pipeline.parameters(
        Sampling(9, 0.7, 0.9, 40, 11, 0.05, 1.1, 0.2, 0.3, True, Grammar(GrammarKind.REGEX, "a|b"))
    )
    expected = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 11, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "logprobs": 1,
        "guided_decoding": ("guided", {"regex": "a|b"}), "detokenize": False,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    schema = pipeline.parameters(Sampling(9, grammar=Grammar(GrammarKind.JSON_SCHEMA, "{}")))
    assert schema["guided_decoding"] == ("guided", {"json": "{}"})


def test_logprobs_are_those_of_the_tokens(made: Any) -> None:
    pipeline, _ = made(FakeModule([([5], None), ([6], "stop")]))
    handle = pipeline.add(1, Job(1, [1], Sampling(4, logprobs=True)))
    found: list[Output] = []

    def is_over() -> bool:
        found.append(handle.take())
        return bool(handle.is_over())

    until(is_over)
    assert [logprob for output in found for logprob in output.logprobs] == [-0.5, -0.6]
