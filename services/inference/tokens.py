"""From token ids back to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# A character of up to four bytes may be spread over several tokens; until it is whole it decodes to this.
REPLACEMENT = "\ufffd"
# A run of bytes that are no UTF-8 at all must not hold back the text behind it for ever.
MAX_HELD = 8


class Decoder(Protocol):
    """A tokenizer's decode, as the `tokenizers` package has it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Turns a growing list of token ids into text deltas of whole characters.

    A token may decode differently behind another one (a leading space, a joined character), so each delta
    is the difference of two decodes that share a short prefix; the cost of a token does not grow with the
    text. The concatenated deltas are the decoded whole.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._start = 0  # where both decodes begin
        self._shown = 0  # tokens whose text was given out

    def push(self, ids: Sequence[int]) -> str:
        """The text that is whole now."""
        self._ids += ids
        return self._delta(final=False)

    def finish(self) -> str:
        """What was held back, as it is."""
        return self._delta(final=True)

    def _delta(self, *, final: bool) -> str:
        if self._shown == len(self._ids):
            return ""
        before = self._decoder.decode(self._ids[self._start : self._shown])
        now = self._decoder.decode(self._ids[self._start :])
        held = len(self._ids) - self._shown
        if not final and now.endswith(REPLACEMENT) and held < MAX_HELD:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]
