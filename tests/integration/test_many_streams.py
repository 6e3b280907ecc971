"""Many streams at once through one Envoy: all live, and its memory is flat while they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import streams
from bench.fleet import fleet
from tests.conftest import free_offset


async def check_flat(folder: Path, number: int, seconds: float) -> None:
    async with fleet(folder, free_offset, ({},)) as made:
        found = await streams.held(made, number, seconds)
    assert (found.alive, found.failed) == (number, 0)
    assert (found.during[0] - found.before) / number < 200 << 10
    assert found.during[-1] < found.during[0] * 1.1 + (8 << 20)


async def test_hundreds_of_streams(tmp_path: Path) -> None:
    await check_flat(tmp_path, 400, 1.0)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_two_thousand_streams_for_ten_minutes(tmp_path: Path) -> None:
    await check_flat(tmp_path, streams.STREAMS, streams.SECONDS)
