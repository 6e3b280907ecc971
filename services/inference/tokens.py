"""From token ids back to text, piece by piece."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

# What a byte-level decoder shows for bytes that are no character, or not yet a whole one. Bytes that a
# character lacks can only be missing at the very end, where they show as exactly one of these.
REPLACEMENT = "\ufffd"
# Tokens that are decoded again at each step when a model makes nothing but broken bytes.
MAX_WINDOW = 64


# Texts up to this length are tokenised in less time than a thread takes to start.
SHORT_CHARACTERS = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as its model splits it. `max_tokens`: what the model reads at most."""

    ids: Sequence[int]
    tokens: Sequence[str]
    max_tokens: int


async def unblocked(characters: int, work: Callable[[], T]) -> T:
    """Tokenise without keeping other calls waiting: long texts in a thread."""
    return work() if characters <= SHORT_CHARACTERS else await asyncio.to_thread(work)


class Decoder(Protocol):
    """A tokenizer's decode, as the `tokenizers` package has it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Turns a growing list of token ids into text deltas of whole characters.

    A token may decode differently behind another one (a leading space, a joined character), so each delta
    is cut from the decoding of a short window that begins a step earlier; the cost of a token does not grow
    with the text. The concatenated deltas are the decoded whole.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._shown = 0  # characters of the decoded window that were given out
        self._boundary = 0  # tokens of the window behind which the last whole text ended

    def push(self, ids: Sequence[int]) -> str:
        """The text that is whole now."""
        self._window += ids
        text = self._decoder.decode(self._window)
        whole = _whole(text)
        delta, self._shown = text[self._shown : whole], max(whole, self._shown)
        endless = len(self._window) > MAX_WINDOW
        if whole == len(text) or endless:
            del self._window[: MAX_WINDOW // 2 if endless else self._boundary]
            self._boundary = len(self._window)
            self._shown = _whole(self._decoder.decode(self._window))
        return delta

    def finish(self) -> str:
        """What was held back, as it is."""
        delta = self._decoder.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return delta


def special_tokens(tokenizer: Any, eos_token_ids: Sequence[int]) -> dict[str, str]:
    """bos_token and eos_token, as chat templates name them: what the tokenizer puts before a text, and what
    ends an answer. One that the model does not have is left out."""
    found: dict[str, str] = {}
    encoding = tokenizer.encode("a")
    if encoding.special_tokens_mask[0]:
        found["bos_token"] = encoding.tokens[0]
    if eos_token_ids and (eos := tokenizer.id_to_token(min(eos_token_ids))) is not None:
        found["eos_token"] = eos
    return found


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token stands for: tokenizers write bytes as letters (GPT-2), as <0x0A> or, spaces, as ▁
    (SentencePiece). Special tokens stand for themselves."""
    piece: str | None = tokenizer.id_to_token(token)
    if piece is None:
        return b""
    if type(tokenizer.decoder).__name__ == "ByteLevel":
        letters = [_BYTES.get(letter) for letter in piece]
        return bytes(b for b in letters if b is not None) if None not in letters else piece.encode()
    if match := _HEX.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    plain = {b for first, last in ("!~", "¡¬", "®ÿ") for b in range(ord(first), ord(last) + 1)}
    others = (b for b in range(256) if b not in plain)
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()
_HEX = re.compile(r"<0x([0-9A-F]{2})>")


def _whole(text: str) -> int:
    """How many characters of `text` are certain."""
    return len(text) - text.endswith(REPLACEMENT)
