"""The agent of one Triton: makes it serve the versions the registry wants, and says so once they are proven.

For each version: fetch and verify the artifact → lay it out → load it beside the others → check it against
its golden examples → announce it READY. What fails is taken out again and announced FAILED with the reason.
When Triton dies its versions go back to LOADING, and all are loaded again when it answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from services.core.discovery import FAILED, LOADING, READY, Hosted, Version, VersionKey
from services.core.errors import BackendUnavailable, DeadlinePassed, LingquError
from services.inference import golden
from services.inference.artifact import Manifest, unlike
from services.inference.classifier import ClassifierModel
from services.inference.encoder import CACHE_BYTES
from services.inference.questions import AnswerModel
from services.inference.repository import Repository
from services.inference.requirements import Machine, Needs, unmet
from services.inference.session import Session
from services.inference.store import ArtifactRefused, ArtifactUnreachable, Store
from services.inference.text import TextModel
from services.inference.triton import LoadFailed, Triton
from services.inference.vectors import VectorModel

log = logging.getLogger(__name__)

POLL_S = 0.5
LEAVE_S = 0.5  # until the gateways send nobody here for a version that is announced no more
RETRY_S = 30.0  # what could not be read or written may be later
EXPECTED = (ArtifactRefused, LoadFailed, golden.GoldenMismatch)


class TensorModel:
    """A model that only Triton's own protocol reaches."""

    def __init__(self, key: VersionKey) -> None:
        self.key = key

    async def close(self) -> None:
        """Holds nothing open."""


Served = TextModel | VectorModel | ClassifierModel | AnswerModel | TensorModel


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model may use: a text model sequences in progress at once; an encoder bytes for what it computed
    before."""

    max_sequences: int
    cache_bytes: int = CACHE_BYTES


class Agent:
    """`served` is what requests may use; `announce` is told every change of the states."""

    def __init__(
        self,
        triton: Triton,
        store: Store,
        repository: Repository,
        limits: Limits,
        machine: Machine,
        announce: Callable[[Iterable[Hosted]], None],
    ) -> None:
        self._triton = triton
        self._store = store
        self._repository = repository
        self._limits = limits
        self._machine = machine
        self._announce = announce
        self._states: dict[VersionKey, Hosted] = {}
        self._leaving: dict[VersionKey, float] = {}  # since when; still loaded, announced no more
        self._loads: dict[VersionKey, asyncio.Task[None]] = {}
        self._retry_at: dict[VersionKey, float] = {}
        self._loading = asyncio.Lock()  # Triton's repository is changed by one load at a time
        self._tidy = False
        self.served: dict[VersionKey, Served] = {}

    async def run(self, wanted: Callable[[], list[Version]], changed: asyncio.Event) -> None:
        """Make `wanted` so, at every change and twice a second, for ever."""
        while True:
            changed.clear()
            try:
                await self._reconcile(wanted())
            except LingquError as err:
                log.warning("Triton: %s", err)
            try:
                await asyncio.wait_for(changed.wait(), POLL_S)
            except TimeoutError:
                continue

    async def close(self) -> None:
        for load in self._loads.values():
            load.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        for model in self.served.values():
            await model.close()

    async def _reconcile(self, wanted: list[Version]) -> None:
        try:
            alive, reachable = await self._triton.ready_versions(), True
        except DeadlinePassed:  # slow is not dead: only what is known to be broken is dropped
            alive, reachable = set(self.served), False
        except BackendUnavailable:
            alive, reachable = set(), False
        await self._drop_lost(alive)
        keys = {version.key for version in wanted}
        for key in [k for k in self._states if k not in keys]:
            del self._states[key]
            self._leaving[key] = time.monotonic()
            self._tell()
        for key, since in list(self._leaving.items()):
            if key in keys:  # wanted again before it was gone
                del self._leaving[key]
            elif time.monotonic() >= since + LEAVE_S:
                await self._retire(key)
        for version in wanted:
            if version.key not in self._states:
                self._set(Hosted(version.key, READY if version.key in self.served else LOADING))
        if not reachable:
            return
        await self._remove_leftovers(keys)
        for version in wanted:
            if self._due(version.key):
                self._loads[version.key] = asyncio.create_task(self._load(version))

    def _due(self, key: VersionKey) -> bool:
        """Whether a load of this version has to begin now."""
        if (load := self._loads.get(key)) is not None and not load.done():
            return False
        if self._states[key].state == FAILED:
            return time.monotonic() >= self._retry_at.get(key, math.inf)
        return self._states[key].state == LOADING

    async def _remove_leftovers(self, wanted: set[VersionKey]) -> None:
        """What an earlier run of this agent left in the repository would be loaded along with the rest."""
        if not self._tidy:
            for key in await asyncio.to_thread(self._repository.others, wanted):
                await self._withdraw(key)
            self._tidy = True

    async def _drop_lost(self, alive: set[VersionKey]) -> None:
        """Versions that Triton no longer has, or whose session broke, have to be loaded again."""
        for key, model in list(self.served.items()):
            broken = isinstance(model, TextModel) and model.session.lost.is_set()
            if key in alive and not broken:
                continue
            log.warning("%s was lost with its Triton; loading it again", key)
            del self.served[key]
            self._set(Hosted(key, LOADING))
            await model.close()

    async def _load(self, version: Version) -> None:
        """Leaves the version READY or FAILED; or LOADING, to be tried again, if Triton went away."""
        key = version.key
        log.info("%s: fetching %s", key, version.uri)
        self._retry_at.pop(key, None)
        try:
            self._check(version, version.requirements)
            folder = await asyncio.to_thread(
                self._store.fetch,
                version.uri,
                version.sha256,
                model=key.model,
                signature=version.signature,
                signer=version.signer,
            )
            manifest = Manifest.read(folder)
            self._check(version, manifest.requirements)
            if (claim := unlike(version, manifest)) is not None:
                raise ArtifactRefused(f"{version.uri} is not what its record says: {claim}")
            async with self._loading:
                await asyncio.to_thread(self._repository.add, key, folder, manifest)
                await self._triton.load(key.model)
            model = await self._proven(key, folder, manifest)
        except (BackendUnavailable, DeadlinePassed) as err:
            log.warning("%s: %s; trying again", key, err)
        except Exception as err:  # whatever is wrong with one version must not harm the others
            unexpected = not isinstance(err, EXPECTED)
            log.error("%s refused: %s", key, _short(err), exc_info=unexpected)  # noqa: TRY400
            again = isinstance(err, ArtifactUnreachable | OSError)
            if again:
                self._retry_at[key] = time.monotonic() + RETRY_S
            await self._withdraw(key)
            self._set(Hosted(key, FAILED, _short(err), again))
        else:
            self.served[key] = model
            self._set(Hosted(key, READY))
            log.info("%s: ready", key)

    def _check(self, version: Version, needs: Needs) -> None:
        """The record's requirements before anything is fetched, the artifact's own before it is loaded."""
        if (reason := unmet(needs, version.runtime, self._machine)) is not None:
            raise ArtifactRefused(f"{version.uri}: {reason}")

    async def _proven(self, key: VersionKey, folder: Path, manifest: Manifest) -> Served:
        if manifest.text is not None:
            session = Session(self._triton, key, self._repository.secret, self._limits.max_sequences)
            text = TextModel(key, manifest.text, folder, session)
            try:
                async with asyncio.timeout(golden.TIMEOUT_S):
                    await golden.check_text(text, manifest)
            except TimeoutError as err:
                await text.close()
                raise golden.GoldenMismatch(f"no golden answer within {golden.TIMEOUT_S:.0f} s") from err
            except BaseException:
                await text.close()
                raise
            return text
        if manifest.vector is not None:
            vectors = VectorModel(key, manifest.vector, folder, self._triton, self._limits.cache_bytes)
            await golden.check_vectors(vectors, manifest)
            return vectors
        if manifest.classifier is not None:
            labels = ClassifierModel(key, manifest.classifier, folder, self._triton, self._limits.cache_bytes)
            await golden.check_labels(labels, manifest)
            return labels
        if manifest.answerer is not None:
            answers = AnswerModel(key, manifest.answerer, folder, self._triton)
            await golden.check_answers(answers, manifest)
            return answers
        return TensorModel(key)

    async def _retire(self, key: VersionKey) -> None:
        """Nobody wants the version, nobody is sent here for it any more: finish what runs, then unload."""
        model = self.served.get(key)
        if isinstance(model, TextModel) and model.session.in_flight:
            return  # looked at again in POLL_S
        if (load := self._loads.pop(key, None)) is not None:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        self.served.pop(key, None)
        if model is not None:
            await model.close()
        await self._withdraw(key)
        del self._leaving[key]
        log.info("%s: retired", key)

    async def _withdraw(self, key: VersionKey) -> None:
        """Take a version out of Triton and leave the model's others as they are."""
        try:
            async with self._loading:
                if await asyncio.to_thread(self._repository.remove, key):
                    await self._triton.load(key.model)
                else:
                    await self._triton.unload(key.model)
        except (LoadFailed, LingquError) as err:
            log.warning("after taking out %s: %s", key, err)

    def _set(self, hosted: Hosted) -> None:
        self._states[hosted.key] = hosted
        self._tell()

    def _tell(self) -> None:
        self._announce(sorted(self._states.values(), key=lambda h: h.key))


def _short(err: Exception) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 500 else text[:497] + "…"
