"""The text path: streams through the public port against the engine's own loop, which nothing can beat."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import lingqu
from bench.report import Target, ratio, row
from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL, bundled

PASSES = 5
STREAMS = (1, 8, 32)
TOKENS = 64
MUST_KEEP = {32: 0.75}  # share of the raw loop's tokens per second, by streams
SUBJECTS = ("canal", "river", "bridge", "mountain", "harbour", "forest", "city", "garden")


@dataclass(frozen=True, slots=True)
class Pass:
    """One measurement: tokens per second of all streams, and the first token's delays in ms."""

    rate: float
    first_ms: list[float]
    tokens: int

    @property
    def first(self) -> float:
        return statistics.median(self.first_ms)


def prompts(number: int, streams: int) -> list[str]:
    """Different for every pass and stream, so that no cached prefix helps; they go on for long."""
    return [
        f"Chapter {number * 100 + i}. The old {SUBJECTS[i % len(SUBJECTS)]} was known to everyone, and"
        for i in range(streams)
    ]


async def measure(suite: Suite) -> list[Target]:
    """Prints what was measured and returns what had to be reached."""
    folder = next(b.package.folder for b in bundled(print) if b.name == TEXT_MODEL)
    raw = subprocess.Popen(
        [sys.executable, "-m", "bench.raw_engine", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    results: dict[tuple[str, int], list[Pass]] = {}
    try:
        async with lingqu.Client(suite.public, suite.key) as client:
            await _ours(client, prompts(0, 8))
            await asyncio.to_thread(_raw, raw, prompts(0, 8))
            for number in range(1, PASSES + 1):
                for streams in STREAMS:
                    texts = prompts(number * 10 + streams, streams)
                    results.setdefault(("raw", streams), []).append(await asyncio.to_thread(_raw, raw, texts))
                    results.setdefault(("ours", streams), []).append(await _ours(client, texts))
    finally:
        raw.terminate()
        raw.wait()
    print(f"\ntext path: {TEXT_MODEL}, {TOKENS} tokens a stream, greedy")
    targets = []
    for streams in STREAMS:
        reference, ours = results["raw", streams], results["ours", streams]
        assert [p.tokens for p in reference] == [p.tokens for p in ours], "not the same work"
        print(row(f"raw engine loop, {streams} streams", [p.rate for p in reference], "tok/s"))
        print(row(f"public port, {streams} streams", [p.rate for p in ours], "tok/s"))
        print(row(f"raw engine loop, {streams} streams, first token", [p.first for p in reference], "ms"))
        print(row(f"public port, {streams} streams, first token", [p.first for p in ours], "ms"))
        share = ratio([p.rate for p in ours], [p.rate for p in reference])
        name = f"public port ÷ raw loop, {streams} streams, tok/s"
        if streams in MUST_KEEP:
            targets.append(Target(name, share, MUST_KEEP[streams]))
        else:
            print(f"  {name:<44} {share:10.2f} ×")
    alone = ratio([p.first for p in results["ours", 1]], [p.first for p in results["raw", 1]])
    targets.append(Target("public port ÷ raw loop, first token alone", alone, 2.0, at_least=False))
    return targets


async def _ours(client: lingqu.Client, texts: list[str]) -> Pass:
    firsts: list[float] = []

    async def one(text: str) -> int:
        last = None
        async for chunk in client.stream(TEXT_MODEL, text, max_tokens=TOKENS, no_cache=True):
            if last is None:
                firsts.append((time.perf_counter() - begun) * 1000)
            last = chunk
        assert last is not None
        return last.usage.completion_tokens

    begun = time.perf_counter()
    tokens = sum(await asyncio.gather(*map(one, texts)))
    return Pass(tokens / (time.perf_counter() - begun), firsts, tokens)


def _raw(process: subprocess.Popen[str], texts: list[str]) -> Pass:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"prompts": texts, "max_tokens": TOKENS}) + "\n")
    body = json.loads(process.stdout.readline())
    return Pass(body["rate"], body["first_ms"], body["tokens"])
