"""What serves the requests for one loaded version, and how much of the machine it may use."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.discovery import VersionKey
from services.inference.classifier import ClassifierModel
from services.inference.encoder import CACHE_BYTES
from services.inference.questions import AnswerModel
from services.inference.text import TextModel
from services.inference.vectors import VectorModel


class TensorModel:
    """A model that only Triton's own protocol reaches."""

    def __init__(self, key: VersionKey) -> None:
        self.key = key

    async def close(self) -> None:
        """Holds nothing open."""


Served = TextModel | VectorModel | ClassifierModel | AnswerModel | TensorModel


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model may use: a text model sequences in progress at once and bytes of KV cache, an encoder
    bytes for what it computed before; and how long any engine may be silent while it has work."""

    max_sequences: int
    kv_cache_bytes: int = 1 << 30
    engine_timeout_s: float = 30.0
    cache_bytes: int = CACHE_BYTES
