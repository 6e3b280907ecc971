"""The prefix cache of the real engine never changes an answer: not by who shares it, not by who gave up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pipeline.bundled import TEXT_MODEL
from services.inference.artifact import Manifest
from services.inference.backends.jobs import NOTHING, Handle, Job, Sampling
from services.inference.backends.openvino_text import OpenVinoText

STARTS = range(100, 900, 25)


class Engine:
    """The runtime, with what tests ask of it."""

    def __init__(self, folder: Path) -> None:
        spec = Manifest.read(folder).text
        assert spec is not None
        self.runtime = OpenVinoText(folder, spec, kv_cache_gib=1, max_sequences=64)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._number = 0

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def add(self, ids: Sequence[int], max_tokens: int = 12, *, logprobs: bool = False) -> Handle:
        self._number += 1
        return self.runtime.add(self._number, Job(0, ids, Sampling(max_tokens, logprobs=logprobs)))

    def texts(self, handles: Sequence[Handle]) -> list[str]:
        tokens: list[list[int]] = [[] for _ in handles]
        logprobs: list[float] = []
        while not all(handle.is_over() for handle in handles):
            self.runtime.step()
            for made, handle in zip(tokens, handles, strict=True):
                output = handle.take()
                made += output.tokens
                logprobs += output.logprobs
        self.logprobs = logprobs
        return [self.tokenizer.decode(made) for made in tokens]


@pytest.fixture(scope="module")
def engine(artifacts: dict[str, Path]) -> Engine:
    return Engine(artifacts[TEXT_MODEL])


def counting(start: int, numbers: int = 8) -> str:
    return ", ".join(str(start + n) for n in range(numbers)) + ","


def test_prompts_that_go_on_from_the_same_cached_beginning_do_not_mix(engine: Engine) -> None:
    """Each digit alone is in the cache, as the beginning of a block; several prompts go on from each."""
    for digit in range(10):
        engine.texts([engine.add(engine.ids(str(digit)), max_tokens=1)])
    answers = engine.texts([engine.add(engine.ids(counting(start))) for start in STARTS])
    assert [answer.split(",")[0].strip() for answer in answers] == [str(start + 8) for start in STARTS]


def test_questions_that_follow_on_a_stream_that_still_runs_do_not_mix(engine: Engine) -> None:
    beginning = engine.ids("Numbers: 7")
    stream = engine.add(beginning, max_tokens=60)
    made: list[int] = []
    while len(made) < 5:
        engine.runtime.step()
        made += stream.take().tokens
    said = [*beginning, *made[:-1]]
    answers = engine.texts(
        [engine.add([*said, *engine.ids(f" And now: {counting(start)}")]) for start in (200, 300, 400, 500)]
    )
    assert [answer.split(",")[0].strip() for answer in answers] == ["208", "308", "408", "508"]
    stream.cancel()


def test_a_prompt_given_up_half_way_leaves_nothing_wrong_behind(
    engine: Engine, artifacts: dict[str, Path]
) -> None:
    prompt = engine.ids(counting(300, 53))
    streams = [engine.add(engine.ids(f"{n} a dog"), max_tokens=60) for n in range(30)]
    for _ in range(12):
        engine.runtime.step()
    given_up = engine.add(prompt)
    engine.runtime.step()
    assert not given_up.take().tokens, "the prompt takes more than a step"
    given_up.cancel()
    engine.texts(streams)
    engine.texts([engine.add(prompt, max_tokens=1, logprobs=True)])
    alone = Engine(artifacts[TEXT_MODEL])
    alone.texts([alone.add(prompt, max_tokens=1, logprobs=True)])
    assert engine.logprobs == pytest.approx(alone.logprobs, abs=1e-3)


def test_what_is_cancelled_before_its_turn_costs_nothing(engine: Engine) -> None:
    prompts = [engine.add(engine.ids(counting(start, 40)), max_tokens=2) for start in (500, 600, 700)]
    for handle in prompts[1:]:
        handle.cancel()
    assert len(engine.texts(prompts)[0]) > 0
    assert [handle.take() for handle in prompts[1:]] == [NOTHING, NOTHING]
