"""What the suite says of itself after some traffic."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lingqu
from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from tests.waiting import until


def command(suite: Suite, *arguments: str) -> subprocess.CompletedProcess[str]:
    lingqu_ = str(Path(sys.executable).parent / "lingqu")
    return subprocess.run(
        [lingqu_, "--state", str(suite.layout.state), "metrics", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )


def asked(suite: Suite, *arguments: str) -> list[dict[str, Any]]:
    done = command(suite, "query", *arguments, "--output", "json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def values(suite: Suite, *arguments: str) -> dict[str, float]:
    """By the label that was grouped by."""
    return {
        next(iter(series["labels"].values()), ""): series["samples"][0]["value"]
        for series in asked(suite, *arguments)
    }


async def test_traffic_is_told_by_model_and_client(suite: Suite) -> None:
    before = values(suite, "requests", "-a", "sum", "--by", "model")
    async with lingqu.Client(suite.public, suite.key) as client:
        for _ in range(5):
            await client.embed(VECTOR_MODEL, ["a canal"])
        await client.generate(TEXT_MODEL, "The canal", max_tokens=7, no_cache=True)

    def told() -> dict[str, float] | None:
        now = values(suite, "requests", "-a", "sum", "--by", "model")
        added = {model: now.get(model, 0) - before.get(model, 0) for model in (TEXT_MODEL, VECTOR_MODEL)}
        return now if added[TEXT_MODEL] >= 1 and added[VECTOR_MODEL] >= 5 else None

    await until(told, "the requests are told", every_s=0.3)
    p95 = values(suite, "requests", "--field", "duration", "--p95", "--by", "model", "--where", "status=OK")
    assert 0 < p95[VECTOR_MODEL] < p95[TEXT_MODEL] < 60
    assert (
        values(suite, "requests", "-a", "count", "--by", "client", "--where", f"model={TEXT_MODEL}")["dev"]
        >= 1
    )

    def engines() -> bool:
        tokens = values(suite, "lingqu.inference.tokens.generated", "-a", "sum", "--by", "model")
        executed = values(suite, "triton", "--field", "executions", "-a", "sum", "--by", "model")
        made = values(suite, "lingqu.inference.engine.tokens", "-a", "sum", "--by", "model")
        cache = values(suite, "lingqu.inference.engine.cache", "-a", "max", "--by", "model")
        return (
            tokens.get(TEXT_MODEL, 0) >= 7
            and made.get(TEXT_MODEL, 0) >= 7
            and 0 < cache.get(TEXT_MODEL, 0) <= 1
            and executed.get(VECTOR_MODEL, 0) >= 1
        )

    await until(engines, "engines and Triton are measured", timeout_s=30, every_s=1)


def test_the_command_line_lists_queries_and_follows(suite: Suite) -> None:
    listed = command(suite, "list", "host")
    assert "host=" in listed.stdout
    table = command(suite, "query", "host", "--field", "memory_used", "--by", "host")
    assert "MEAN" in table.stdout
    assert any(bar in table.stdout for bar in "▁▂▃▄▅▆▇█")
    rows = command(suite, "query", "host", "--field", "cpu", "--window", "10s", "--by", "host", "-o", "csv")
    read = list(csv.DictReader(io.StringIO(rows.stdout)))
    assert read
    assert all(0 <= float(row["value"]) <= 1 and row["time"].endswith("Z") for row in read)
    followed = command(suite, "tail", "host", "-n", "1", "-o", "json")
    assert json.loads(followed.stdout)["measurement"] == "host"


def test_the_command_line_says_what_is_wrong(suite: Suite) -> None:
    for arguments, said in {
        ("query", "host", "--percentile", "101"): "percentile",
        ("query", "host", "--p50", "--p95"): "one of",
        ("query", "host", "--since", "yesterday"): "30s, 5m, 1h or 2d",
        ("query", "host", "--where", "model"): "is not like",
        ("query", "host", "--since", "0s"): "start_time",
        ("query", "host", "--by", "a", "--by", "a"): "names a label twice",
    }.items():
        done = command(suite, *arguments)
        assert done.returncode != 0, arguments
        assert said in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
