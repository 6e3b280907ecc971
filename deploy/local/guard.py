"""Ends the suite's processes when their supervisor is gone, however it went.

A child of the supervisor, connected by a pipe on standard input: "+N" says that process group N lives, "-N"
that it has ended, "~PATTERN" which files to remove then. When the pipe closes, whatever still lives is asked
to end and then killed. Only the standard library, so that it starts fast and stays small.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import sys
import time

GRACE_S = 2.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, None] = {}
    patterns: list[str] = []
    for line in sys.stdin:
        if line[0] == "~":
            patterns.append(line[1:].rstrip("\n"))
            continue
        group = int(line[1:])
        if line[0] == "+":
            groups[group] = None
        else:
            groups.pop(group, None)
    _end(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(_lives(group) for group in groups):
        time.sleep(0.05)
    _end(groups, signal.SIGKILL)
    if groups:
        for pattern in patterns:
            remove(pattern)


def remove(pattern: str) -> None:
    """Unlink what the pattern matches."""
    for name in glob.glob(pattern):  # noqa: PTH207 - an absolute pattern
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108


def _end(groups: dict[int, None], number: signal.Signals) -> None:
    for group in reversed(groups):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
