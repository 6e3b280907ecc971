"""The reference for the text path: the engine's own loop, without a server around it.

Run as `python -m bench.raw_engine ARTIFACT`; reads {"prompts": […], "max_tokens": n} a line, answers as
bench/stream_client.py does."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as og
from tokenizers import Tokenizer

from services.inference.artifact import Manifest
from services.inference.backends.openvino_text import pipeline_path


def main(folder: Path) -> None:
    spec = Manifest.read(folder).text
    assert spec is not None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    scheduler = og.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.max_num_seqs = 256
    scheduler.enable_prefix_caching = True
    pipeline = og.ContinuousBatchingPipeline(str(pipeline_path(folder, spec)), scheduler, "CPU")
    for line in sys.stdin:
        asked = json.loads(line)
        config = og.GenerationConfig()
        config.max_new_tokens = asked["max_tokens"]
        config.eos_token_id = min(spec.eos_token_ids)
        config.stop_token_ids = set(spec.eos_token_ids)
        ids = [tokenizer.encode(prompt).ids for prompt in asked["prompts"]]
        print(json.dumps(_run(pipeline, ids, config)), flush=True)


def _run(pipeline: Any, prompts: list[list[int]], config: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    handles = [
        pipeline.add_request(number, openvino.Tensor(np.array([ids], dtype=np.int64)), config)
        for number, ids in enumerate(prompts)
    ]
    times: list[list[float]] = [[] for _ in handles]
    tokens = 0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now = time.perf_counter()
        for number, handle in enumerate(handles):
            made = 0
            while handle.can_read():
                made += sum(len(o.generated_ids) for o in handle.read().values())
            if made:
                times[number].append(now)
                tokens += made
    return {
        "seconds": time.perf_counter() - begun,
        "tokens": tokens,
        "first_ms": [(each[0] - begun) * 1000 for each in times],
        "gaps_ms": [(b - a) * 1000 for each in times for a, b in itertools.pairwise(each)],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
