"""How much of the processor the service leaves to what it measures."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

_THREADS = Path("/proc/self/task")


def lower(nice: int) -> None:
    """Set the niceness of every thread that there is, and so of those that they start: on Linux each has its
    own. Where that is refused the service goes on as it is."""
    for thread in _THREADS.iterdir():
        try:
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
        except ProcessLookupError:
            continue  # it has ended meanwhile
        except OSError as err:
            log.warning("the priority cannot be lowered to nice %d: %s", nice, err)
            return
