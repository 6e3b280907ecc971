"""The leader's work: versions move through their stages by what the replicas say, rollouts by their plans."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from lingqu.registry.v1 import models_pb2
from services.core.errors import Conflict, LingquError
from services.core.tasks import background
from services.registry import keyspace, rollouts, stages
from services.registry.catalog import Catalog
from services.registry.commits import Commits
from services.registry.conductor import Conductor
from services.registry.etcd import Put, Unchanged
from services.registry.keyspace import MODELS
from services.registry.leader import Leadership
from services.registry.mirror import Mirror
from services.registry.stages import Holdings

log = logging.getLogger(__name__)

# Changes that come together are looked at together; and so often without any, for timers.
DEBOUNCE_S = 0.05
IDLE_S = 1.0
UNPROVEN = (stages.REGISTERED, stages.VALIDATING)


class Steward:
    """Looks only at models in which something may be due: those that changed, and then as long as a version
    is on its way to READY or a rollout runs."""

    def __init__(
        self,
        mirror: Mirror,
        catalog: Catalog,
        commits: Commits,
        conductor: Conductor,
        leadership: Leadership,
    ) -> None:
        self._mirror = mirror
        self._catalog = catalog
        self._commits = commits
        self._conductor = conductor
        self._leadership = leadership
        self._due: set[str] = set()

    async def run(self) -> None:
        """While this replica leads and etcd answers: look, act, wait for a change; for ever."""
        async with background(self._follow()):
            while True:
                seen = self._mirror.revision
                fence = self._leadership.fence
                if fence is not None and not self._mirror.stale:
                    for name in sorted(self._due):
                        await self._look(name, fence)
                await self._mirror.moved_from(seen, IDLE_S)
                await asyncio.sleep(DEBOUNCE_S)

    async def _follow(self) -> None:
        """Note which models change; from a snapshot, all."""
        while True:
            try:
                async with aclosing(self._mirror.follow(MODELS)) as updates:
                    async for update in updates:
                        self._due |= {keyspace.model_of(change.key) for change in update.changes}
            except LingquError as err:
                log.info("looking at all models again: %s", err)

    async def _look(self, name: str, fence: Unchanged) -> None:
        self._due.discard(name)
        try:
            for model in self._catalog.models(name):
                await self._stages(model, fence)
                while rollouts.running(model.rollout) and await self._conductor.move(name, fence):
                    continue
                if rollouts.running(model.rollout) or any(v.stage in UNPROVEN for v in model.versions):
                    self._due.add(name)
        except Conflict:
            self._due.add(name)  # somebody was faster, or this replica leads no more
        except LingquError as err:
            self._due.add(name)
            log.warning("%s: %s", name, err)
        except Exception:
            # A record that cannot be read must not end the registry; it is looked at again when it changes.
            log.exception("%s: cannot be looked at", name)

    async def _stages(self, model: models_pb2.Model, fence: Unchanged) -> None:
        for version in model.versions:
            if version.stage not in UNPROVEN:
                continue
            while await self._step(model, version.version, fence):
                continue

    async def _step(self, model: models_pb2.Model, number: int, fence: Unchanged) -> bool:
        """Move a version on by one stage; False if there is none. Its stage is read in the same moment as
        the condition that it stays: a release may have changed it while the version before was written."""
        version = self._catalog.version(model.name, number)
        fitting = self._catalog.fitting(model.placement)
        holdings = Holdings.of(self._catalog.hosting(model.name, number), fitting)
        step = stages.following(version.stage, holdings, model.policy.min_ready_replicas)
        if step is None:
            return False
        to, why = step
        key = keyspace.stage(model.name, number)
        only_if = [*self._commits.unchanged(key), fence]
        await self._commits.commit([Put(key, stages.record(to, why).SerializeToString())], only_if)
        log.info("%s v%d: %s (%s)", model.name, number, stages.name(to), why)
        return True
