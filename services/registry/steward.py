"""The leader's work: versions move through their stages by what the replicas say, rollouts by their plans."""

from __future__ import annotations

import asyncio
import logging

from lingqu.registry.v1 import models_pb2
from services.core.errors import Conflict, LingquError
from services.registry import keyspace, rollouts, stages
from services.registry.catalog import Catalog
from services.registry.commits import Commits
from services.registry.conductor import Conductor
from services.registry.etcd import Put, Unchanged
from services.registry.leader import Leadership
from services.registry.mirror import Mirror
from services.registry.stages import Holdings

log = logging.getLogger(__name__)

# Changes that come together are looked at together; and so often without any, for timers.
DEBOUNCE_S = 0.05
IDLE_S = 1.0


class Steward:
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

    async def run(self) -> None:
        """While this replica leads and etcd answers: look, act, wait for a change; for ever."""
        while True:
            seen = self._mirror.revision
            fence = self._leadership.fence
            if fence is not None and not self._mirror.stale:
                await self._round(fence)
            await self._mirror.moved_from(seen, IDLE_S)
            await asyncio.sleep(DEBOUNCE_S)

    async def _round(self, fence: Unchanged) -> None:
        for model in self._catalog.models():
            try:
                await self._stages(model, fence)
                while rollouts.running(model.rollout) and await self._conductor.move(model.name, fence):
                    continue
            except Conflict:
                continue  # somebody was faster, or this replica leads no more: the next round will show
            except LingquError as err:
                log.warning("%s: %s", model.name, err)

    async def _stages(self, model: models_pb2.Model, fence: Unchanged) -> None:
        for version in model.versions:
            if version.stage not in (stages.REGISTERED, stages.VALIDATING):
                continue
            while await self._step(model, version.version, fence):
                continue

    async def _step(self, model: models_pb2.Model, number: int, fence: Unchanged) -> bool:
        """Move a version on by one stage; False if there is none. Its stage is read in the same moment as
        the condition that it stays: a release may have changed it while the version before was written."""
        version = self._catalog.version(model.name, number)
        holdings = Holdings.of(self._catalog.hosting(model.name, number))
        step = stages.following(version.stage, holdings, model.policy.min_ready_replicas)
        if step is None:
            return False
        to, why = step
        key = keyspace.stage(model.name, number)
        only_if = [*self._commits.unchanged(key), fence]
        await self._commits.commit([Put(key, stages.record(to, why).SerializeToString())], only_if)
        log.info("%s v%d: %s (%s)", model.name, number, stages.name(to), why)
        return True
