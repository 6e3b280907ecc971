"""The reference for vectors: sentence-transformers in a process of its own, called by threads.

`python -m bench.sentences CHECKPOINT`; reads {"texts": […], "callers", "seconds"} a line, answers with
{"rate"}: texts a second, each encoded by itself, as a server without batching does."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time

from sentence_transformers import SentenceTransformer


def main(checkpoint: str) -> None:
    model = SentenceTransformer(checkpoint, device="cpu", local_files_only=True)
    for line in sys.stdin:
        print(json.dumps({"rate": rate(model, **json.loads(line))}), flush=True)


def rate(model: SentenceTransformer, texts: list[str], callers: int, seconds: float) -> float:
    begun = time.monotonic()
    counts = [0] * callers

    def caller(number: int) -> None:
        for text in itertools.cycle(texts[number::callers]):
            if time.monotonic() >= begun + seconds:
                return
            model.encode([text], show_progress_bar=False, normalize_embeddings=True)
            counts[number] += 1

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - begun)


if __name__ == "__main__":
    main(sys.argv[1])
