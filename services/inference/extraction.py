"""From a model's logits to answers: the best spans of a context that was read in overlapping windows.

A span's probability is that of its start times that of its end, each a softmax over all places of the
context, as in https://arxiv.org/abs/1810.04805 (4.2, 4.3). A token that several windows read counts once,
with the highest logit it got; "no answer" is the first token of a window, and the windows have to agree on
it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of the context: the number in the whole context of its first token, where each of its tokens
    begins and ends, INT [tokens, 2] in characters, and their logits, FP32 [tokens]. `null` are the start and
    end logit of "no answer"."""

    first: int
    places: npt.NDArray[np.int64]
    starts: Floats
    ends: Floats
    null: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Span:
    """A place in the context, in characters."""

    start: int
    end: int
    score: float


def best(windows: Sequence[Window], top: int, max_tokens: int, no_answer: bool) -> list[Span]:
    """At most `top` spans of at most `max_tokens` tokens, best first, none overlapping; none at all if "no
    answer" may win and does."""
    windows = [window for window in windows if len(window.places)]
    if not windows:
        return []  # nothing but spaces
    nulls = [window.null for window in windows] if no_answer else []
    null = min(nulls, key=sum, default=None)
    total = _total(windows, 0, null) + _total(windows, 1, null)
    found: list[Span] = []
    order = count()  # no two entries of the heap are ever compared by window
    heap = [
        (-score, next(order), place, w) for w in windows for score, place in [_best(w, found, max_tokens)]
    ]
    heapify(heap)
    if null is not None and heap and sum(null) > -heap[0][0]:
        return []
    while heap and len(found) < top:
        negative, _, (start, end), window = heappop(heap)
        if negative == np.inf:
            break
        if any(start < span.end and span.start < end for span in found):
            # Chosen from another window meanwhile: the window's best that is left.
            score, place = _best(window, found, max_tokens)
            heappush(heap, (-score, next(order), place, window))
            continue
        found.append(Span(start, end, float(np.exp(-negative - total))))
        score, place = _best(window, found, max_tokens)
        heappush(heap, (-score, next(order), place, window))
    return found


def _total(windows: Sequence[Window], which: int, null: tuple[float, float] | None) -> float:
    """log Σ exp over all places of the context, of start (0) or end (1) logits."""
    highest = np.full(max(window.first + len(window.places) for window in windows), -np.inf)
    for window in windows:
        read = highest[window.first : window.first + len(window.places)]
        np.maximum(read, window.ends if which else window.starts, out=read)
    if null is not None:
        highest = np.append(highest, null[which])
    return float(np.logaddexp.reduce(highest))


def _best(window: Window, taken: Sequence[Span], max_tokens: int) -> tuple[float, tuple[int, int]]:
    """The highest sum of a start and an end logit, and from where to where in characters; -inf if nothing is
    left beside what is taken."""
    size = len(window.places)
    free = window.places[:, 0] < window.places[:, 1]
    for span in taken:
        free &= (window.places[:, 1] <= span.start) | (window.places[:, 0] >= span.end)
    # How many free tokens in a row begin at each.
    blocked = np.where(free, size, np.arange(size))
    room = np.minimum.accumulate(blocked[::-1])[::-1] - np.arange(size)
    reach = min(max_tokens, size)
    padded = np.concatenate([window.ends.astype(np.float64), np.full(reach - 1, -np.inf)])
    ends = np.lib.stride_tricks.sliding_window_view(padded, reach)
    sums = window.starts.astype(np.float64)[:, None] + ends
    sums = np.where(np.arange(reach)[None, :] < room[:, None], sums, -np.inf)
    first, more = divmod(int(np.argmax(sums)), reach)
    place = int(window.places[first, 0]), int(window.places[min(first + more, size - 1), 1])
    return float(sums[first, more]), place


def whole(context: str, span: Span) -> Span:
    """With the combining marks that follow it: tokenizers drop them from the last letter they belong to."""
    end = span.end
    while end < len(context) and unicodedata.category(context[end]).startswith("M"):
        end += 1
    return Span(span.start, end, span.score)
