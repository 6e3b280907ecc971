"""The short way of tokens: in order, complete, for the engine's process only, and its end is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from services.inference.backends import wire
from services.inference.backends.jobs import Finish
from services.inference.backends.line import PACKET_BYTES, Line, Listener

TIMEOUT_S = 5


@dataclass
class Heard:
    """What a listener was told."""

    packets: list[bytes] = field(default_factory=list)
    ends: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def rows(self, packed: bytes) -> None:
        self.packets.append(packed)
        self.news.set()

    async def until(self, size: int) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            while sum(map(len, self.packets)) < size:
                self.news.clear()
                await self.news.wait()
        return b"".join(self.packets)


@pytest.fixture
async def heard() -> Heard:
    return Heard()


@pytest.fixture
async def listener(heard: Heard) -> AsyncIterator[Listener]:
    made = Listener("secret", heard.rows, heard.ends.set)
    yield made
    made.close()


@pytest.fixture
def line(listener: Listener) -> Line:
    return Line(listener.address, "secret")


async def test_rows_arrive_as_the_tensor_would_have_them(line: Line, heard: Heard) -> None:
    rows = wire.rows(7, (1, 2), Finish.NONE, ()) + wire.rows(8, (), Finish.STOP, ())
    assert line.send(rows)
    came = await heard.until(len(rows))
    assert list(struct.iter_unpack("<4i", came)) == [
        (7, 1, Finish.NONE, 0),
        (7, 2, Finish.NONE, 0),
        (8, wire.NO_TOKEN, Finish.STOP, 0),
    ]
    line.close()


async def test_no_rows_say_that_the_engine_works(line: Line, heard: Heard) -> None:
    assert line.send(b"")
    async with asyncio.timeout(TIMEOUT_S):
        await heard.news.wait()
    assert heard.packets == [b""]
    assert not heard.ends.is_set()
    line.close()


async def test_what_a_slow_reader_leaves_is_sent_later_and_in_order(line: Line, heard: Heard) -> None:
    sent, number = bytearray(), 0
    while True:  # nobody reads: this task does not leave the loop to the listener
        rows = struct.pack("<i", number) * (PACKET_BYTES // 4 + 4)
        sent += rows
        number += 1
        if not line.send(rows):
            break
    rest = b"\1" * 16
    finishing = threading.Thread(target=line.finish)
    finishing.start()
    assert await heard.until(len(sent)) == sent
    finishing.join(TIMEOUT_S)
    line.send(rest)
    assert await heard.until(len(sent) + 16) == sent + rest
    line.close()


async def test_the_end_of_either_side_is_noticed_by_the_other(
    line: Line, listener: Listener, heard: Heard
) -> None:
    line.send(b"")
    async with asyncio.timeout(TIMEOUT_S):
        await heard.news.wait()
    other_heard = Heard()
    other = Listener("secret", other_heard.rows, other_heard.ends.set)
    left = Line(other.address, "secret")
    assert left.is_open()
    other.close()
    assert not left.is_open()
    with pytest.raises(BrokenPipeError):
        left.send(b"")
    line.close()
    async with asyncio.timeout(TIMEOUT_S):
        await heard.ends.wait()
    assert not other_heard.ends.is_set(), "who closes need not be told"


async def test_who_does_not_know_the_secret_is_not_heard(listener: Listener, heard: Heard) -> None:
    stranger = Line(listener.address, "guess")
    with contextlib.suppress(BrokenPipeError):
        stranger.send(b"\0" * 16)
    line = Line(listener.address, "secret")
    line.send(b"\1" * 16)
    assert await heard.until(16) == b"\1" * 16
    assert not stranger.is_open()
    with pytest.raises(ConnectionRefusedError):
        Line(listener.address, "secret")  # one engine's process has come: nobody else is expected
    line.close()


async def test_without_abstract_names_nobody_listens(monkeypatch: pytest.MonkeyPatch, heard: Heard) -> None:
    monkeypatch.delattr(socket, "SOCK_SEQPACKET")
    listener = Listener("secret", heard.rows, heard.ends.set)
    assert listener.address == ""
    listener.close()
