"""Which rows are computed together: rows of a run are padded to its longest, and padding costs as much as
text."""

from __future__ import annotations

from collections.abc import Sequence

MAX_TOKENS = 4096
"""Tokens of a run, padding included: 16 texts of 256 tokens. Bounds memory."""
MAX_PADDING = 0.25
"""Share of a run that may be padding."""
FREE_PADDING = 16
"""Tokens that may be padding whatever the share: a run of its own costs as much again (3 ms for MiniLM on two
cores, where a token costs 0.2 ms)."""


def runs(lengths: Sequence[int], most_rows: int | None = None) -> list[list[int]]:
    """Indices of `lengths` in runs, longest rows first; each index once. A run keeps to MAX_TOKENS (or is one
    row) and to MAX_PADDING or FREE_PADDING, and has at most `most_rows`."""
    found: list[list[int]] = []
    run: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        tokens = lengths[index]
        if run:
            area = lengths[run[0]] * (len(run) + 1)
            padding = area - real - tokens
            wasteful = padding > max(FREE_PADDING, MAX_PADDING * area)
            if area > MAX_TOKENS or wasteful or len(run) == most_rows:
                found.append(run)
                run, real = [], 0
        run.append(index)
        real += tokens
    if run:
        found.append(run)
    return found


def padding(lengths: Sequence[int], run: Sequence[int]) -> int:
    """Tokens of a run that are padding."""
    return len(run) * max(lengths[i] for i in run) - sum(lengths[i] for i in run)
