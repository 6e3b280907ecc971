"""The reference for the text path: the engine's own loop, without a server around it.

Run as `python -m bench.raw_engine ARTIFACT`; reads {"prompts": […], "max_tokens": n} a line, answers with
tokens per second, the delay of every stream's first token in ms, and the number of tokens."""

from __future__ import annotations

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
    firsts: dict[int, float] = {}
    tokens = 0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for number, handle in enumerate(handles):
            while handle.can_read():
                made = sum(len(o.generated_ids) for o in handle.read().values())
                if made and number not in firsts:
                    firsts[number] = (time.perf_counter() - begun) * 1000
                tokens += made
    seconds = time.perf_counter() - begun
    return {"rate": tokens / seconds, "first_ms": list(firsts.values()), "tokens": tokens}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
