"""The text path: streams through the public port against the engine's own loop, which nothing can beat."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peer import Peer
from bench.report import Target, ratio, row
from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL, bundled

PASSES = 5
STREAMS = (1, 8, 32)
TOKENS = 64
MUST_KEEP = {1: 0.94, 8: 0.94, 32: 0.90}  # share of the raw loop's tokens per second, by streams
MOST_GAP = 1.5  # inter-token p99 ÷ the raw loop's
SUBJECTS = ("canal", "river", "bridge", "mountain", "harbour", "forest", "city", "garden")
SAME_WORK = 0.02  # tokens may differ by so much: near ties decide when a text ends


@dataclass(frozen=True, slots=True)
class Pass:
    """One measurement of several streams: tokens per second of all, the first text's delays and the times
    between two messages of a stream, in ms."""

    rate: float
    tokens: int
    first_ms: list[float]
    gaps_ms: list[float]

    @classmethod
    def of(cls, told: dict[str, Any]) -> Pass:
        return cls(told["tokens"] / told["seconds"], told["tokens"], told["first_ms"], told["gaps_ms"])

    @property
    def first(self) -> float:
        return statistics.median(self.first_ms)


def prompts(number: int, streams: int) -> list[str]:
    """Different for every pass and stream, so that no cached prefix helps; they go on for long."""
    return [
        f"Chapter {number * 100 + i}. The old {SUBJECTS[i % len(SUBJECTS)]} was known to everyone, and"
        for i in range(streams)
    ]


def folder_of(model: str) -> Path:
    return next(b.package.folder for b in bundled(print) if b.name == model)


async def measure(suite: Suite) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    raw, client = Peer("bench.raw_engine", str(folder_of(TEXT_MODEL))), Peer("bench.stream_client")
    public = {"protocol": "grpc", "address": suite.public, "key": suite.key, "model": TEXT_MODEL}
    results: dict[tuple[str, int], list[Pass]] = {}
    try:
        for number in range(PASSES + 1):
            for streams in STREAMS:
                asked = {"prompts": prompts(number * 10 + streams, streams), "max_tokens": TOKENS}
                both = {"raw": (raw, asked), "ours": (client, {**public, **asked})}
                for name, (peer, question) in both.items():
                    found = Pass.of(await peer.measure(question))
                    if number:  # the first pass warms up
                        results.setdefault((name, streams), []).append(found)
    finally:
        raw.close()
        client.close()
    print(f"\ntext path: {TEXT_MODEL}, {TOKENS} tokens a stream, greedy")
    targets = []
    for streams in STREAMS:
        reference, ours = results["raw", streams], results["ours", streams]
        tokens = [sum(p.tokens for p in each) for each in (reference, ours)]
        assert abs(tokens[0] - tokens[1]) <= SAME_WORK * tokens[0], "not the same work"
        for name, passes in (("raw engine loop", reference), ("public port", ours)):
            print(row(f"{name}, {streams} streams", [p.rate for p in passes], "tok/s"))
            print(row(f"{name}, {streams} streams, first token", [p.first for p in passes], "ms"))
            print(row(f"{name}, {streams} streams, inter-token p99", [p99(p.gaps_ms) for p in passes], "ms"))
        share = ratio([p.rate for p in ours], [p.rate for p in reference])
        targets.append(Target(f"public port ÷ raw loop, {streams} streams, tok/s", share, MUST_KEEP[streams]))
        gaps = [[p99(p.gaps_ms) for p in each] for each in (ours, reference)]
        name = f"public port ÷ raw loop, {streams} streams, inter-token p99"
        targets.append(Target(name, ratio(*gaps), MOST_GAP, at_least=False))
        together = [p99([gap for p in each for gap in p.gaps_ms]) for each in (ours, reference)]
        print(row(f"÷, {streams} streams, p99 of all passes together", [together[0] / together[1]], "×"))
    alone = ratio([p.first for p in results["ours", 1]], [p.first for p in results["raw", 1]])
    targets.append(Target("public port ÷ raw loop, first token alone", alone, 2.0, at_least=False))
    return targets


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]
