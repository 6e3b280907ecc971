"""What engines say of themselves, as figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

from services.core.discovery import VersionKey
from services.inference.backends import wire
from services.inference.engines import Engines
from services.inference.figures import (
    ENGINE_CACHE,
    ENGINE_SEQUENCES,
    ENGINE_STEPS,
    ENGINE_TOKENS,
    ENGINE_WASTED,
    Figures,
)
from services.inference.text import TextModel
from tests.waiting import until

ONE, TWO = VersionKey("one", 1), VersionKey("two", 1)


class Call:
    def __init__(self, said: bytes | None, requests: AsyncIterator[Any]) -> None:
        self._said, self._requests = said, requests
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        (request,) = [found async for found in self._requests]
        command = wire.load(request.raw_input_contents[0][4:])
        assert (command.op, command.secret) == ("stats", "secret")
        if self._said is None:
            await asyncio.Event().wait()
        yield SimpleNamespace(infer_response=SimpleNamespace(raw_output_contents=[self._said]))

    def cancel(self) -> None:
        self.cancelled = True


class Triton:
    """`says` what engines answer; None: one does not."""

    def __init__(self) -> None:
        self.says: list[Mapping[str, Any] | bytes | None] = []
        self.calls: list[Call] = []

    def stream(self, requests: AsyncIterator[Any]) -> Call:
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        raw = b"\0\0\0\0" + json.dumps(said).encode() if isinstance(said, Mapping) else said
        self.calls.append(Call(raw, requests))
        return self.calls[-1]


async def told(says: list[Mapping[str, Any] | bytes | None], monkeypatch: Any) -> Figures:
    """The figures when all of it was said, of two models of which one is no text model."""
    monkeypatch.setattr("services.inference.engines.TIMEOUT_S", 0.05)
    triton, figures = Triton(), Figures()
    triton.says, number = says, len(says)
    served: Any = {ONE: TextModel.__new__(TextModel), TWO: object()}
    engines = Engines(triton, "secret", lambda: served, figures, every_s=0.001)  # type: ignore[arg-type]
    task = asyncio.create_task(engines.run())
    await until(lambda: len(triton.calls) > number + 1, "it was asked", every_s=0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert all(call.cancelled for call in triton.calls)
    return figures


async def test_what_came_since_is_counted_and_what_is_now_is_told(monkeypatch: Any) -> None:
    figures = await told(
        [
            {"sequences": 2, "steps": 10, "tokens": 20, "wasted": 1, "cache": 0.25},
            {"sequences": 3, "steps": 15, "tokens": 32, "wasted": 1, "cache": 0.5},
            {"sequences": 1, "steps": 4, "tokens": 4, "wasted": 0, "cache": 0.125},  # another process
        ],
        monkeypatch,
    )
    assert figures.total(ENGINE_STEPS) == 15 + 4
    assert figures.total(ENGINE_TOKENS, model="one", version="1") == 32 + 4
    assert figures.total(ENGINE_WASTED) == 1
    assert [f.value for f in figures.snapshot(ENGINE_SEQUENCES)] == [1]
    assert [f.value for f in figures.snapshot(ENGINE_CACHE)] == [0.125]


async def test_an_engine_that_does_not_answer_is_asked_again(monkeypatch: Any) -> None:
    figures = await told(
        [None, b"none", {"sequences": 1, "steps": 2, "tokens": 2, "cache": None}], monkeypatch
    )
    assert figures.total(ENGINE_TOKENS) == 2
    assert [f.value for f in figures.snapshot(ENGINE_SEQUENCES)] == [1]
    assert figures.snapshot(ENGINE_CACHE) == []
