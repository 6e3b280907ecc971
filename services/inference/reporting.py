"""What a replica says of a load that goes on: "fetching 43 of 98 MiB"."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.inference.sizing import MIB
from services.inference.transfer import Progress

EVERY_S = 2.0  # each one is a write to etcd that all watchers see


def fetching(note: Callable[[str, float], None], every_s: float = EVERY_S) -> Progress:
    """A Progress for the thread that fetches; `note` is called with a sentence and the share in place, in the
    event loop that runs now, every `every_s` at most."""
    loop = asyncio.get_running_loop()
    told_at = time.monotonic()  # what is here within that time needs no words

    def tell(done: int, total: int) -> None:
        nonlocal told_at
        if total and time.monotonic() - told_at >= every_s:
            told_at = time.monotonic()
            text = f"fetching {done // MIB} of {-(-total // MIB)} MiB"
            loop.call_soon_threadsafe(note, text, min(1.0, max(0.0, done / total)))

    return tell
