"""Who speaks slowly to a REST port directly, without a gateway in front of it, is hung up on (slow loris)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.inference.rest.connection import Patience
from services.inference.rest.server import serving_http
from tests.waiting import pause

PATIENCE = Patience(headers=0.3, body=0.5)
MARGIN_S = 4.0
WHOLE = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
HALF = WHOLE[:20]
BODILESS = WHOLE[:-2]


@pytest.fixture(scope="module")
async def address() -> AsyncIterator[tuple[str, str]]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Reads all of a request, and then answers in two pieces that are longer apart than any patience."""
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(PATIENCE.body * 1.2 if scope["path"] == "/slow" else 0)
        await send({"type": "http.response.body", "body": b"b"})

    async with serving_http(app, "127.0.0.1:0", 1.0, patience=PATIENCE) as listening:
        host, _, port = listening.rpartition(":")
        yield host, port


# What is sent at once, and what then comes byte by byte.
SLOW = {
    "nothing": (b"", b""),
    "its first line byte by byte": (b"", HALF),
    "headers that stop": (HALF, b""),
    "headers that never end": (HALF, b"x" * 99),
    "a body that does not come": (BODILESS, b""),
    "a body that trickles in": (BODILESS.replace(b" 2", b" 99"), b"x" * 98),
    "headers behind a request": (WHOLE + HALF, b""),
    "headers without end behind a request": (WHOLE + HALF, b"x" * 99),
    "a body behind a request": (WHOLE + BODILESS, b""),
    "empty lines behind a request": (WHOLE, b"\r\n" * 49),
}


@pytest.mark.parametrize("name", SLOW)
async def test_who_keeps_it_waiting_is_hung_up_on(address: tuple[str, str], name: str) -> None:
    at_once, then = SLOW[name]
    reader, writer = await asyncio.open_connection(*address)
    writer.write(at_once)
    trickling = asyncio.ensure_future(_trickle(writer, then))
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE.headers + PATIENCE.body + MARGIN_S):
            await reader.read()
    trickling.cancel()
    writer.close()
    assert time.monotonic() - began > PATIENCE.headers * 0.9


async def _trickle(writer: asyncio.StreamWriter, bytes_: bytes) -> None:
    for byte in bytes_:
        await pause(PATIENCE.headers / 6, "a byte now and then")
        writer.write(bytes([byte]))


async def test_answers_and_pauses_between_requests_may_be_longer(address: tuple[str, str]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    for request in (WHOLE.replace(b" / ", b" /slow "), WHOLE, WHOLE * 2):
        writer.write(request)
        for _ in range(request.count(b"POST")):
            async with asyncio.timeout(MARGIN_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                assert await reader.readexactly(2) == b"ab"
        await pause(PATIENCE.headers * 1.5, "nothing is asked for a while")
    writer.close()
