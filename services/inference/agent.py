"""The agent of one Triton: makes it serve the versions the registry wants, and says so once they are proven.

For each version: fetch and verify the artifact → lay it out → load it beside the others → check it against
its golden examples → announce it READY. What fails is taken out again and announced FAILED with the reason.
When Triton dies its versions go back to LOADING, and all are loaded again when it answers. So does a version
whose process in Triton dies or hangs; one that does so again and again is quarantined.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from services.core.discovery import FAILED, LOADING, READY, Hosted, Version, VersionKey
from services.core.errors import BackendUnavailable, DeadlinePassed, LingquError
from services.inference import estimate, golden, memory, processes, reporting, sizing
from services.inference.artifact import Manifest, unlike
from services.inference.processes import Processes
from services.inference.proving import Prover
from services.inference.quarantine import Quarantine
from services.inference.repository import Repository
from services.inference.requirements import Machine, Needs, unmet
from services.inference.served import Limits, Served
from services.inference.store import ArtifactRefused, ArtifactUnreachable, Store
from services.inference.tensorrt.plan import BuildFailed, Plans, recipe
from services.inference.text import TextModel
from services.inference.triton import LoadFailed, Triton
from services.inference.watchdog import Watchdog
from services.inference.weights import UnreadableWeights

log = logging.getLogger(__name__)

POLL_S = 0.5
LEAVE_S = 0.5  # until the gateways send nobody here for a version that is announced no more
RETRY_S = 30.0  # what could not be read or written may be later


class Refused(Exception):
    """This replica does not load the version; the text says why."""


EXPECTED = (ArtifactRefused, LoadFailed, golden.GoldenMismatch, Refused)


class Agent:
    """`served` is what requests may use; `announce` is told every change of the states; `busy` says whether
    requests for a version run or wait."""

    def __init__(
        self,
        triton: Triton,
        store: Store,
        repository: Repository,
        limits: Limits,
        machine: Machine,
        announce: Callable[[Iterable[Hosted]], None],
        busy: Callable[[VersionKey], bool] = lambda key: False,
        quarantine: Quarantine | None = None,
        available_bytes: Callable[[], int] = memory.available_bytes,
        plans: Plans | None = None,
    ) -> None:
        self._triton = triton
        self._store = store
        self._repository = repository
        self._limits = limits
        self._machine = machine
        self._announce = announce
        self._busy = busy
        self._quarantine = quarantine or Quarantine(repository.root.parent / "quarantine.json")
        self._available_bytes = available_bytes
        self._plans = plans
        self._processes = Processes(repository.root)
        self._watchdog = Watchdog(self._processes, limits.engine_timeout_s)
        self._prover = Prover(triton, repository.secret, limits, self._watchdog)
        self._records: dict[VersionKey, Version] = {}
        self._broken: set[VersionKey] = set()  # Triton says READY of them, and they are not
        self._ends: set[asyncio.Task[None]] = set()
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
        slow = False
        try:
            alive, reachable = await self._triton.ready_versions(), True
        except DeadlinePassed:  # slow is not dead: only what is known to be broken is dropped
            alive, reachable, slow = set(self.served), False, True
        except BackendUnavailable:
            alive, reachable = set(), False
        self._watchdog.heard(not slow or self._loading.locked())  # Triton may well be slow while it loads
        self._records = {version.key: version for version in wanted}
        await self._end_broken(alive if reachable else None)
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

    async def _end_broken(self, answering: set[VersionKey] | None) -> None:
        """End engines that died or hang, and have them loaded again. `answering`: what Triton has, if it
        answers."""
        broken = self._watchdog.broken()
        if not broken or answering is None:
            return
        try:
            await self._triton.ready_versions()  # after the engines were looked at
        except LingquError:
            return
        blameless = await asyncio.to_thread(self._watchdog.triton_ended)
        for key, found in broken.items():
            why = found.why
            self._watchdog.end(key)
            model = self.served.pop(key, None) or self._prover.proving.get(key)
            self._broken.add(key)
            if (version := self._records.get(key)) is not None and found.blame and not blameless:
                self._quarantine.strike(version, why)
            if isinstance(model, TextModel):
                model.session.lose(why)
            if model is not None and key not in self._prover.proving:
                if key in self._states:
                    self._set(Hosted(key, LOADING, f"{why}; loading it again"))
                await model.close()

    async def _drop_lost(self, alive: set[VersionKey]) -> None:
        """Versions that Triton no longer has, or whose session broke, have to be loaded again."""
        for key, model in list(self.served.items()):
            broken = isinstance(model, TextModel) and model.session.lost.is_set()
            if key in alive and not broken:
                continue
            log.warning("%s was lost with its Triton; loading it again", key)
            del self.served[key]
            self._watchdog.forget(key)
            if key in alive:
                self._broken.add(key)
            self._set(Hosted(key, LOADING))
            await model.close()

    async def _load(self, version: Version) -> None:
        """Leaves the version READY or FAILED; or LOADING, to be tried again, if Triton went away."""
        key = version.key
        log.info("%s: fetching %s", key, version.uri)
        self._retry_at.pop(key, None)
        try:
            if (why := self._quarantine.loading(version)) is not None:
                raise Refused(why)
            if key in self._broken and key in await self._triton.ready_versions():
                await self._withdraw(key)  # or Triton would leave it as it is
            self._broken.discard(key)
            self._check(version, version.requirements)
            folder = await asyncio.to_thread(
                self._store.fetch,
                version.uri,
                version.sha256,
                model=key.model,
                signature=version.signature,
                signer=version.signer,
                progress=reporting.fetching(lambda text, share: self._note(key, text, share)),
            )
            manifest = Manifest.read(folder)
            self._check(version, manifest.requirements)
            if (claim := unlike(version, manifest)) is not None:
                raise ArtifactRefused(f"{version.uri} is not what its record says: {claim}")
            plan = await self._plan(key, folder, manifest)
            async with self._loading:
                self._note(key, "loading")
                await self._check_memory(version, folder, manifest)
                await asyncio.to_thread(self._repository.add, key, folder, manifest, plan)
                await self._triton_load(version)
            self._broken.add(key)  # until it has answered
            self._note(key, "checking its golden examples")
            model = await self._prover.proven(key, folder, manifest)
            self._broken.discard(key)
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

    async def _plan(self, key: VersionKey, folder: Path, manifest: Manifest) -> Path | None:
        """What TensorRT makes of the artifact for this GPU, built now if it never was. Raises Refused."""
        spec = manifest.encoder
        if manifest.runtime != "tensorrt" or spec is None:
            return None
        if self._plans is None or not self._machine.gpus:
            raise Refused("its runtime is tensorrt, and this replica builds no plans")
        gpu, digest = self._machine.gpus[0], manifest.files[spec.weights].sha256
        of = recipe(digest, tuple(spec.inputs), spec.max_tokens, gpu, self._plans.version)
        self._note(key, f"building its engine for {gpu.name} with TensorRT {of.tensorrt}")
        try:
            return await asyncio.to_thread(self._plans.get, folder / spec.weights, of, self._store.go_on)
        except BuildFailed as err:
            raise Refused(str(err)) from err

    async def _check_memory(self, version: Version, folder: Path, manifest: Manifest) -> None:
        """Raises Refused, with figures, if the version would take more memory than there is: the kernel would
        end something else for it."""
        if version.key in await self._triton.ready_versions():  # it is in memory already
            return
        try:
            needed = await asyncio.to_thread(estimate.of, folder, manifest, self._limits.kv_cache_bytes)
        except UnreadableWeights as err:
            raise Refused(str(err)) from err
        if (why := sizing.unfit(needed.footprint, self._available_bytes())) is not None:
            raise Refused(why)

    async def _triton_load(self, version: Version) -> None:
        """A Triton that was there and is gone after that was, as far as anybody can tell, ended by it."""
        try:
            await self._triton.load(version.key.model)
        except BackendUnavailable:
            self._quarantine.strike(version, "Triton ended while it was loaded")
            raise

    def _check(self, version: Version, needs: Needs) -> None:
        """The record's requirements before anything is fetched, the artifact's own before it is loaded."""
        if (reason := unmet(needs, version.runtime, self._machine)) is not None:
            raise ArtifactRefused(f"{version.uri}: {reason}")

    async def _retire(self, key: VersionKey) -> None:
        """Nobody wants the version, nobody is sent here for it any more: finish what runs, then unload."""
        model = self.served.get(key)
        if self._busy(key) or (isinstance(model, TextModel) and model.session.in_flight):
            return  # looked at again in POLL_S
        if (load := self._loads.pop(key, None)) is not None:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        self.served.pop(key, None)
        if model is not None:
            await model.close()
        await self._withdraw(key)
        self._quarantine.forget(key)
        del self._leaving[key]
        log.info("%s: retired", key)

    async def _withdraw(self, key: VersionKey) -> None:
        """Take a version out of Triton and leave the model's others as they are. A process of it that does
        not end by itself is ended."""
        self._watchdog.forget(key)
        running = await asyncio.to_thread(self._processes.of, key)
        try:
            async with self._loading:
                if await asyncio.to_thread(self._repository.remove, key):
                    await self._triton.load(key.model)
                else:
                    await self._triton.unload(key.model)
        except (LoadFailed, LingquError) as err:
            log.warning("after taking out %s: %s", key, err)
        if running:
            end = asyncio.create_task(asyncio.to_thread(processes.end, running))
            self._ends.add(end)
            end.add_done_callback(self._ends.discard)

    def _note(self, key: VersionKey, text: str, progress: float = 0.0) -> None:
        """What is being done with a version that loads."""
        if (state := self._states.get(key)) is not None and state.state == LOADING:
            self._set(replace(state, detail=text, progress=progress))

    def _set(self, hosted: Hosted) -> None:
        self._states[hosted.key] = hosted
        self._tell()

    def _tell(self) -> None:
        self._announce(sorted(self._states.values(), key=lambda h: h.key))


def _short(err: Exception) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 500 else text[:497] + "…"
