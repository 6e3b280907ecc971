"""How a version that Triton has loaded proves itself: it is opened as requests will use it, watched by the
watchdog, and gives its golden answers (golden.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from services.core.discovery import VersionKey
from services.inference import estimate, golden, sizing
from services.inference.artifact import Manifest, TextSpec
from services.inference.classifier import ClassifierModel
from services.inference.questions import AnswerModel
from services.inference.served import Limits, Served, TensorModel
from services.inference.session import Session
from services.inference.text import TextModel
from services.inference.triton import Triton
from services.inference.vectors import VectorModel
from services.inference.watchdog import Watchdog
from services.inference.weights import UnreadableWeights


class Prover:
    """`proving` are the models that give their proof now. `secret` is what text models want to hear."""

    def __init__(self, triton: Triton, secret: str, limits: Limits, watchdog: Watchdog) -> None:
        self._triton = triton
        self._secret = secret
        self._limits = limits
        self._watchdog = watchdog
        self.proving: dict[VersionKey, Served] = {}

    async def proven(self, key: VersionKey, folder: Path, manifest: Manifest) -> Served:
        """The model, ready for requests. Raises GoldenMismatch, and what an engine raises."""
        if manifest.text is not None:
            return await self._text(key, folder, manifest, manifest.text)
        pulse = self._triton.new_pulse(key)
        await self._watchdog.watch(key, lambda: pulse.silent_s, lambda: pulse.ill)
        proof = self._proof(key, folder, manifest)
        if proof is None:
            return TensorModel(key)
        encoder, check = proof
        self.proving[key] = encoder
        try:
            await check(manifest)
        finally:
            del self.proving[key]
        return encoder

    async def _text(self, key: VersionKey, folder: Path, manifest: Manifest, spec: TextSpec) -> TextModel:
        unfit, kv_tokens = await self._longest(folder, manifest)
        session = Session(self._triton, key, self._secret, self._limits.max_sequences)
        try:
            text = TextModel(key, spec, folder, session, unfit, kv_tokens)
        except BaseException:  # a tokenizer or a template that cannot be read
            await session.close()
            raise
        self.proving[key] = text
        try:
            await self._watchdog.watch(key, lambda: session.silent_s)
            async with asyncio.timeout(golden.TIMEOUT_S):
                await golden.check_text(text, manifest)
        except TimeoutError as err:
            await text.close()
            raise golden.GoldenMismatch(f"no golden answer within {golden.TIMEOUT_S:.0f} s") from err
        except BaseException:
            await text.close()
            raise
        finally:
            del self.proving[key]
        return text

    async def _longest(self, folder: Path, manifest: Manifest) -> tuple[Callable[[int], str | None], int]:
        """Why a sequence of so many tokens can never be computed here, None if it can; and how many tokens
        the cache has room for, 0 if that is not known."""
        cache = self._limits.kv_cache_bytes
        try:
            kv = (await asyncio.to_thread(estimate.of, folder, manifest, cache)).kv
        except UnreadableWeights:
            kv = None
        if kv is None:
            return lambda tokens: None, 0
        return lambda tokens: sizing.never_fits(tokens, kv, cache), kv.longest(cache)

    def _proof(
        self, key: VersionKey, folder: Path, manifest: Manifest
    ) -> tuple[Served, Callable[[Manifest], Awaitable[None]]] | None:
        """The model, if its artifact describes an encoder, and how it proves itself."""
        cache = self._limits.cache_bytes
        if manifest.vector is not None:
            vectors = VectorModel(key, manifest.vector, folder, self._triton, cache)
            return vectors, partial(golden.check_vectors, vectors)
        if manifest.classifier is not None:
            labels = ClassifierModel(key, manifest.classifier, folder, self._triton, cache)
            return labels, partial(golden.check_labels, labels)
        if manifest.answerer is not None:
            answers = AnswerModel(key, manifest.answerer, folder, self._triton)
            return answers, partial(golden.check_answers, answers)
        return None
