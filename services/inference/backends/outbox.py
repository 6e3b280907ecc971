"""The thread that sends a model's answers to Triton, so that the engine need not wait for it.

Triton takes about a millisecond for a message, in which the engine could compute. The engine's step keeps the
interpreter's lock, so that another thread would only come between two steps: the engine therefore waits, in
`flush`, until sending has begun; what is left of it needs no lock. When Triton is slow, what was not sent yet
waits and becomes one message, and the engine waits for nobody.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

HAND_OVER_S = 0.002


class Postable(ABC):
    """Somebody with messages. All but `hand_over` are called on the outbox's thread."""

    def hand_over(self) -> bool:
        """Send what there is without Triton, if that takes no time. Called on the engine's thread; False
        leaves it to the outbox's."""
        return False

    @abstractmethod
    def take(self) -> list[tuple[Any, int]]:
        """What is to be sent, as (response or None, flags); it is not asked for again."""

    @abstractmethod
    def send(self, response: Any, flags: int) -> None:
        """Hand it to Triton. May raise when the request is gone."""

    @abstractmethod
    def failed(self) -> None:
        """Sending raised: nobody reads any more."""


class Outbox:
    """One thread; `close` ends it, and what was not sent is lost."""

    def __init__(self) -> None:
        self._new: dict[int, Postable] = {}  # the engine's thread's own
        self._lock = threading.Lock()
        self._waiting: dict[int, Postable] = {}
        self._full, self._begun = threading.Event(), threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._thread.start()

    def add(self, sender: Postable) -> None:
        """It has something to send with the next flush. Called on the engine's thread, as that is."""
        self._new[id(sender)] = sender

    def flush(self) -> None:
        """Returns once sending has begun, or after HAND_OVER_S."""
        left = {number: sender for number, sender in self._new.items() if not sender.hand_over()}
        self._new.clear()
        if not left:
            return
        with self._lock:
            self._waiting.update(left)
        self._begun.clear()
        self._full.set()
        self._begun.wait(HAND_OVER_S)

    def close(self) -> None:
        self._closed = True
        self._full.set()
        self._thread.join(timeout=1)

    def _deliver(self) -> None:
        while not self._closed:
            self._full.wait()
            self._full.clear()
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            taken = [(sender, sender.take()) for sender in waiting.values()]
            self._begun.set()
            for sender, messages in taken:
                try:
                    for response, flags in messages:
                        sender.send(response, flags)
                except Exception:
                    sender.failed()
