"""The README's examples, run as they stand: only the address and the state folder are this suite's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(suite: Suite, kind: str, text: str) -> subprocess.CompletedProcess[str]:
    text = text.replace("127.0.0.1:8080", suite.public).replace(".lingqu/", f"{suite.layout.state}/")
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "LINGQU_STATE": str(suite.layout.state), "PATH": path}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_works(suite: Suite, number: int) -> None:
    done = run(suite, *EXAMPLES[number])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if (
        "lingqu metrics query" in EXAMPLES[number][1]
    ):  # after some traffic: the p95 of each model, and its rate
        for model in (TEXT_MODEL, VECTOR_MODEL):
            assert done.stdout.count(model) >= 2, done.stdout


def test_there_are_examples_of_both_kinds() -> None:
    kinds = [kind for kind, _ in EXAMPLES]
    assert kinds.count("sh") >= 3
    assert kinds.count("python") >= 2


def test_the_command_line_says_what_is_wrong(suite: Suite) -> None:
    for command, expected in {
        "lingqu generate hello --model nope": 'model "nope" does not exist',
        "lingqu generate hello --max-tokens 0": "max_tokens",
        "lingqu models show nope": 'there is no model "nope"',
        "lingqu models publish x /nowhere": "has no manifest.json",
        "lingqu --state /nowhere status": "no suite is running",
        "lingqu --state /nowhere generate hello": "no suite is running",
        "lingqu --key wrong generate hello": "key",
        "lingqu keys create 'a b'": "client",
    }.items():
        done = run(suite, "sh", command)
        assert done.returncode == 1, command
        assert expected in done.stderr, (command, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_key_that_was_created_works(suite: Suite) -> None:
    done = run(suite, "sh", "lingqu --key $(lingqu keys create alice) generate hello --max-tokens 3")
    assert done.returncode == 0, done.stderr
    denied = run(suite, "sh", "lingqu --key $(lingqu keys create alice) keys create bob")
    assert "no admin scope" in denied.stderr


def test_a_chat_answers_every_line(suite: Suite) -> None:
    questions = "printf 'Say hello.\\nSay it again.\\n' | lingqu chat --system 'Be brief.' --max-tokens 12"
    done = run(suite, "sh", questions)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
