"""The one way a model's traffic changes: a transaction with its checks and its entry in the history."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from lingqu.registry.v1 import models_pb2 as pb
from services.core.errors import Conflict, InvalidInput, TooSoon
from services.core.identity import ANONYMOUS, Caller
from services.registry import keyspace, policies, stages, traffic
from services.registry.catalog import Catalog
from services.registry.commits import Commits
from services.registry.etcd import Put, Unchanged
from services.registry.stages import Holdings

T = TypeVar("T")

HISTORY = 1000
RETRIES_REMEMBERED = 100


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for a release, why, and on which condition; `expected` 0: on none."""

    kind: pb.ReleaseKind.ValueType
    caller: Caller = ANONYMOUS
    reason: str = ""
    request_id: str = ""
    expected: int = 0


@dataclass(frozen=True, slots=True)
class Extra:
    """What else belongs into the transaction of a release."""

    puts: tuple[Put, ...] = ()
    only_if: tuple[Unchanged, ...] = ()
    deletes: tuple[str, ...] = ()


NOTHING = Extra()


class Releases:
    """Raises the errors that ModelService documents."""

    def __init__(self, catalog: Catalog, commits: Commits) -> None:
        self._catalog = catalog
        self._commits = commits

    async def settled(self, name: str, asked: Asked, attempt: Callable[[pb.Model], Awaitable[T]]) -> T:
        """Run `attempt` on a model as etcd has it now: a copy that is behind would have it refuse what is
        right, find nothing to do where there is, and not know that the request was carried out elsewhere.

        Again, if what got in its way was not another release but, say, the registry itself, which has moved
        one of the versions to its next stage; or this very request."""
        await self._commits.caught_up()
        for last in (False, False, True):
            model = self._catalog.model(name)
            try:
                return await attempt(model)
            except Conflict:
                await self._commits.caught_up()
                changed = self._catalog.model(name).traffic_revision != model.traffic_revision
                if last or (changed and self._done(name, asked) is None):
                    raise
        raise AssertionError

    def repeated(self, model: pb.Model, asked: Asked, after: pb.Traffic | None = None) -> bool:
        """Whether this request was carried out already. Raises Conflict if its condition does not hold, and
        InvalidInput if its id was that of another one: with other weights than `after`, if that is given."""
        if (done := self._done(model.name, asked)) is not None:
            if done.kind != asked.kind or (after is not None and done.after.weights != after.weights):
                raise InvalidInput("request_id", f"was used already, for release {done.number}")
            return True
        if asked.expected and asked.expected != model.traffic_revision:
            raise Conflict(f'the traffic of "{model.name}" was changed since you looked; look again')
        return False

    def admissible(self, model: pb.Model, after: pb.Traffic) -> Extra:
        """Every version that `after` gives requests, or copies of them, exists, is not off line and is ready
        on as many replicas as the policy asks; those that get more than before also pass its thresholds.
        Returns the condition that this stays so, for `carry_out`."""
        before, share = traffic.shares(model.traffic), traffic.shares(after)
        for number in sorted(traffic.serving(after)):
            version = self.ready(model.name, number, model.policy.min_ready_replicas)
            if share.get(number, 0) > before.get(number, 0):
                policies.check_evaluation(version, model.policy)
        return self.basis(model, after)

    def ready(self, name: str, number: int, needed: int = 1) -> pb.ModelVersion:
        """The version, if it is not off line and so many live replicas have it ready."""
        version = self._catalog.version(name, number)
        policies.check_version(version)
        policies.check_ready(version, self.holdings(name, number), needed)
        return version

    def basis(self, model: pb.Model, after: pb.Traffic) -> Extra:
        """The condition that the policy and the stages by which `after` was judged stay as they are. To be
        taken together with the model: once something was awaited, the copy may be a later one."""
        judged = traffic.serving(model.traffic) ^ traffic.serving(after)
        judged |= set(after.aliases.values()) - set(model.traffic.aliases.values())
        keys = [keyspace.stage(model.name, number) for number in sorted(judged)]
        return Extra(only_if=tuple(self._commits.unchanged(keyspace.model(model.name, "policy"), *keys)))

    async def pace(self, model: pb.Model) -> Extra:
        """Holds the policy's interval between releases: raises TooSoon, or starts the next one."""
        key = keyspace.model(model.name, "cooldown")
        interval = model.policy.min_release_interval.seconds
        if interval and (left := await self._commits.remaining_s(key)) is not None:
            raise TooSoon(
                f'"{model.name}" was released less than {interval} s ago; the next may come in {left} s', left
            )
        if not interval:
            return NOTHING
        lease = await self._commits.lease(interval)
        return Extra((Put(key, b"", lease),), (Unchanged(key, 0),))

    async def carry_out(self, model: pb.Model, state: pb.Model, asked: Asked, *extras: Extra) -> pb.Model:
        """Commit `state` with its history entry and the stages it implies; the model as it is then. One of
        `extras` has to be the `basis` on which it was decided."""
        key = keyspace.model(model.name, "traffic")
        entry_key = keyspace.release(model.name, state.last_release)
        puts = [
            Put(key, state.SerializeToString()),
            Put(entry_key, self._entry(model, state, asked).SerializeToString()),
        ]
        only_if = [Unchanged(key, model.traffic_revision), Unchanged(entry_key, 0)]
        before, after = traffic.serving(model.traffic), traffic.serving(state.traffic)
        for number in sorted(before ^ after):
            to = stages.SERVING if number in after else stages.READY
            stage_key = keyspace.stage(model.name, number)
            puts.append(Put(stage_key, stages.record(to, asked.reason).SerializeToString()))
        deletes = [d for extra in extras for d in extra.deletes]
        if state.last_release > HISTORY:
            deletes.append(keyspace.release(model.name, state.last_release - HISTORY))
        for extra in extras:
            puts += extra.puts
            only_if += extra.only_if
        try:
            await self._commits.commit(puts, only_if, deletes)
        except Conflict as err:
            for lease in {put.lease for put in puts if put.lease}:
                await self._commits.release(lease)
            raise Conflict(
                f'"{model.name}" was released by somebody else at the same time; look again'
            ) from err
        return self._catalog.model(model.name)

    def history(self, name: str) -> traffic.History:
        found = {release.number: release for release in self._catalog.releases(name, HISTORY)}
        return found.get

    def holdings(self, name: str, version: int) -> Holdings:
        return Holdings.of(self._catalog.hosting(name, version))

    def _done(self, name: str, asked: Asked) -> pb.Release | None:
        """The release that has the request's id."""
        latest = self._catalog.releases(name, RETRIES_REMEMBERED) if asked.request_id else ()
        return next((release for release in latest if release.request_id == asked.request_id), None)

    def _entry(self, model: pb.Model, state: pb.Model, asked: Asked) -> pb.Release:
        entry = pb.Release(
            number=state.last_release,
            kind=asked.kind,
            actor=asked.caller.client,
            reason=asked.reason,
            before=model.traffic,
            after=state.traffic,
            request_id=asked.request_id,
            previous_traffic=state.previous_traffic,
            previous_release=state.previous_release,
        )
        newest = self._catalog.releases(model.name, 1)
        last = newest[0].time.ToNanoseconds() if newest else 0
        entry.time.FromNanoseconds(max(time.time_ns(), last + 1000))
        return entry
