"""What is remembered of grammars that were tried, by a process of the test's own that answers as told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.core.errors import InvalidInput
from services.inference import grammars
from services.inference.backends.jobs import Grammar, GrammarKind
from services.inference.grammars import Grammars

# Counts in a file what it is asked; "slow" is not answered while there is a file of that name.
PROCESS = """
import json, sys, time
from pathlib import Path
here = Path(sys.argv[1])
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    text = json.loads(line)["text"]
    with (here / "asked").open("a") as asked:
        asked.write(text + " ")
    while (here / text).exists():
        time.sleep(0.01)
    if text == "die":
        sys.exit(1)
    print(json.dumps({"error": "no such thing" if text == "bad" else None}), flush=True)
"""


@pytest.fixture
async def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Grammars]:
    monkeypatch.setattr(grammars, "TRY_S", 0.5)
    made = Grammars(tmp_path, tmp_path)
    made._argv = [sys.executable, "-c", PROCESS, str(tmp_path)]
    yield made
    await made.close()


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


async def refused(tried: Grammars, text: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        await tried.check(regex(text))
    assert caught.value.field == "response_format.regex"
    return str(caught.value)


async def test_each_grammar_is_tried_once(tried: Grammars, tmp_path: Path) -> None:
    await asyncio.gather(*(tried.check(regex("good")) for _ in range(20)))
    for _ in range(2):
        assert "no such thing" in await refused(tried, "bad")
    await tried.check(regex("good"))
    assert (tmp_path / "asked").read_text().split() == ["good", "bad"]


async def test_what_took_too_long_is_not_tried_at_once_again(tried: Grammars, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    for _ in range(2):
        assert "to compile" in await refused(tried, "slow")
    assert (tmp_path / "asked").read_text().split() == ["slow"]


async def test_it_is_tried_later_for_the_machine_may_have_been_busy(
    tried: Grammars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "DOUBT_S", 0.0)
    (tmp_path / "slow").touch()
    assert "to compile" in await refused(tried, "slow")
    (tmp_path / "slow").unlink()
    for _ in range(2):
        await tried.check(regex("slow"))
    assert (tmp_path / "asked").read_text().split() == ["slow", "slow"]


async def test_a_process_that_dies_takes_no_other_grammar_with_it(tried: Grammars) -> None:
    assert "memory" in await refused(tried, "die")
    await tried.check(regex("good"))
