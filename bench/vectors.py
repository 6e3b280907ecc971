"""Vectors through the public port, by many callers of one text each, against sentence-transformers."""

from __future__ import annotations

import base64
import importlib.util
import random
import statistics
from typing import Any

from bench.peer import Peer
from bench.report import Target, ratio, row
from bench.suite import Suite
from lingqu.inference.v1 import inference_pb2 as pb
from pipeline.bundled import VECTOR_MODEL, shipped_checkpoint

PASSES = 5
CALLERS = 32
SECONDS = 4.0
TEXTS = 40_000  # more than a pass computes: none comes twice, so that no cache helps
EMBED = "/lingqu.inference.v1.InferenceService/Embed"
WORDS = (
    "canal",
    "river",
    "lock",
    "bridge",
    "boat",
    "water",
    "level",
    "old",
    "stone",
    "narrow",
    "gate",
    "town",
)


def texts(seed: int, number: int) -> list[str]:
    """Different ones, of 4 to 24 words."""
    words = random.Random(seed)
    return [f"{seed} {n} " + " ".join(words.choices(WORDS, k=words.randint(4, 24))) for n in range(number)]


def asked(suite: Suite, sentences: list[str], callers: int, seconds: float) -> dict[str, Any]:
    requests = [pb.EmbedRequest(model=VECTOR_MODEL, inputs=[text]).SerializeToString() for text in sentences]
    return {
        "address": suite.public,
        "key": suite.key,
        "path": EMBED,
        "requests": [base64.b64encode(one).decode() for one in requests],
        "callers": callers,
        "seconds": seconds,
    }


async def measure(suite: Suite) -> list[Target]:
    ours, theirs, hits = [], [], []
    client = Peer("bench.call_client")
    installed = importlib.util.find_spec("sentence_transformers") is not None
    reference = Peer("bench.sentences", str(shipped_checkpoint())) if installed else None
    try:
        for number in range(PASSES + 1):
            found = await client.measure(asked(suite, texts(number, TEXTS), CALLERS, SECONDS))
            same = await client.measure(asked(suite, texts(0, 1), 1, 1.0))
            if reference is not None:
                question = {"texts": texts(number, 4000), "callers": CALLERS, "seconds": SECONDS}
                rate = (await reference.measure(question))["rate"]
            if number:  # the first pass warms up
                ours.append(found["rate"])
                hits.append(statistics.median(same["ms"]))
                if reference is not None:
                    theirs.append(rate)
    finally:
        client.close()
        if reference is not None:
            reference.close()
    print(f"\nvectors: {VECTOR_MODEL}, {CALLERS} callers, a text of 4 to 24 words a call")
    print(row("public port", ours, "texts/s"))
    print(row("the same text again, from the cache", hits, "ms"))
    targets = [
        Target("a vector from the cache, p50", statistics.median(hits), 1.5, at_least=False, unit="ms")
    ]
    if reference is None:
        print("  sentence-transformers is not installed: pip install sentence-transformers")
        return targets
    print(row("sentence-transformers, as many threads", theirs, "texts/s"))
    return [Target("public port ÷ sentence-transformers, texts/s", ratio(ours, theirs), 3.0), *targets]
