"""Tries grammars, in a process of its own: `python -m services.inference.grammar_process FOLDER GRAMMAR`.

One JSON line in, {"kind", "text"}, one out, {"error"}: null, or the compiler's own words. What compiles for
ever or takes all memory is ended with this process, by whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as og

from services.inference.backends.jobs import Grammar, GrammarKind, Sampling
from services.inference.backends.openvino_text import generation_config

TOKENS = 16  # tried: a grammar that has no way on is found when it is followed
MEMORY = 2 << 30  # bytes that compiling may take beyond what is there at the start
# What comes before the reason: the compiler's time and source line.
_PLACE = re.compile(r"^(\[[\d:]+\] )?\S+\.(cc|cpp|hpp|h):\d+:\s*(Check failed: \(.*?\) is false: )?")


def main(folder: Path, model: Path) -> None:
    eos = set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    tokenizer = og.Tokenizer(str(folder))
    pipeline = _open(model, tokenizer)
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201 - the protocol
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        error = None
        try:
            _follow(pipeline, number, Grammar(GrammarKind(asked["kind"]), asked["text"]), eos)
        except Exception as err:  # also what the engine's binding makes of numbers too large for it
            error = reason(str(err)) or "cannot be compiled"
        print(json.dumps({"error": error}), flush=True)  # noqa: T201
        if error:
            pipeline = _open(model, tokenizer)  # the old one goes on failing


def _open(model: Path, tokenizer: og.Tokenizer) -> og.ContinuousBatchingPipeline:
    scheduler = og.SchedulerConfig()
    scheduler.num_kv_blocks = 16
    return og.ContinuousBatchingPipeline(str(model.parent), tokenizer, scheduler, "CPU")


def _follow(pipeline: og.ContinuousBatchingPipeline, number: int, grammar: Grammar, eos: set[int]) -> None:
    prompt = openvino.Tensor(np.array([[min(eos)]], dtype=np.int64))
    sampling = Sampling(TOKENS, grammar=grammar)
    handle = pipeline.add_request(number, prompt, generation_config(sampling, eos))
    while pipeline.has_non_finished_requests():
        pipeline.step()
    del handle  # kept until here: a request without a handle is dropped


def reason(error: str) -> str:
    """The compiler's message without where in its source it comes from."""
    line = next((line for line in error.splitlines() if line.strip()), "")
    return _PLACE.sub("", line).strip()[:300]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
