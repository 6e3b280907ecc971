"""Carries rollouts out: starting, reporting and ending them, and the moves that the rule decides."""

from __future__ import annotations

import uuid

from lingqu.registry.v1 import models_pb2, rollouts_pb2
from services.core.errors import InvalidInput, NotFound, NotReady, RolloutRunning
from services.core.identity import Caller
from services.registry import keyspace, policies, rollouts, traffic
from services.registry.catalog import Catalog
from services.registry.commits import Commits
from services.registry.etcd import Put, Unchanged
from services.registry.releases import NOTHING, Asked, Extra, Releases
from services.registry.rollouts import Move, Seen, running

# Who is named in the history for the registry's own steps.
ROLLOUT = Caller("rollout", admin=False)


class Conductor:
    """Raises the errors that RolloutService documents. Every move is one release, so one transaction; `fence`
    is added to those of the leader, so that one that was deposed unaware changes nothing."""

    def __init__(self, catalog: Catalog, commits: Commits, releases: Releases) -> None:
        self._catalog = catalog
        self._commits = commits
        self._releases = releases

    async def start(
        self, name: str, version: int, plan: rollouts_pb2.RolloutPlan, asked: Asked
    ) -> rollouts_pb2.Rollout:
        """Raises the errors of a release."""

        async def attempt(model: models_pb2.Model) -> rollouts_pb2.Rollout:
            if self._releases.repeated(model, asked):
                return model.rollout
            policies.check_releaser(model, asked.caller, "release")
            self.check_idle(model)
            stable = model.traffic_version
            if [w.percent for w in model.traffic.weights] != [100]:
                raise NotReady(
                    f'a rollout starts from one version with all traffic; "{name}" has not got that'
                )
            if stable == version:
                raise InvalidInput("version", f"{version} has all traffic already")
            rollout = rollouts_pb2.Rollout(
                id=uuid.uuid4().hex[:12],
                model=name,
                version=version,
                from_version=stable,
                plan=plan,
                state=rollouts.RUNNING,
                actor=asked.caller.client,
                reason=asked.reason,
            )
            rollout.create_time.GetCurrentTime()
            rollout.step_time.CopyFrom(rollout.create_time)
            after = traffic.canary(model, stable, version, plan.steps[0].percent, plan.shadow_percent)
            basis = self._releases.admissible(model, after)
            # Later steps are not asked again, and a first one of copies only gives the version no share.
            policies.check_evaluation(self._catalog.version(name, version), model.policy)
            pace = await self._releases.pace(model)
            timed = await self._timed(rollout, rollouts.wait_s(rollout))
            state = traffic.forward(model, after)
            done = await self._releases.carry_out(model, state, asked, basis, pace, timed)
            return done.rollout

        return await self._releases.settled(name, asked, attempt)

    async def report(
        self, name: str, rollout_id: str, report: rollouts_pb2.VerdictReport, caller: Caller
    ) -> rollouts_pb2.Rollout:
        """Takes the report into account with those before it on the same step: what it says anew counts, and
        a step that has failed stays failed."""
        policies.check_releaser(self._catalog.model(name), caller, "judge the rollout of")
        rollout = self._running(name, rollout_id)
        if reason := rollouts.refused(rollout):
            raise NotReady(f'the step has failed already and "{name}" is being rolled back: {reason}')
        if report.step != rollout.step:
            raise NotReady(f'the rollout of "{name}" is at step {rollout.step} by now, not {report.step}')
        report.time.GetCurrentTime()
        rollout.report.CopyFrom(rollouts.together(rollout, report))
        key = keyspace.model(name, "rollout")
        await self._commits.commit([Put(key, rollout.SerializeToString())], self._commits.unchanged(key))
        return self._catalog.model(name).rollout

    async def abort(self, name: str, reason: str, caller: Caller) -> rollouts_pb2.Rollout:
        model = self._catalog.model(name)
        policies.check_releaser(model, caller, "end the rollout of")
        self._running(name, model.rollout.id)
        why = f"ended by {caller.client or 'a caller without a key'}{f': {reason}' if reason else ''}"
        return await self._back(model, why, caller, NOTHING)

    async def move(self, name: str, fence: Unchanged) -> bool:
        """Do what is to be done next for a model's rollout; False if that is nothing."""
        model = self._catalog.model(name)
        if not running(model.rollout):
            return False
        rollout, guard = model.rollout, Extra(only_if=(fence,))
        seen = Seen(
            timer=self._commits.present(keyspace.model(name, "timer")),
            ready=self._releases.holdings(name, rollout.version).ready,
            stable_ready=self._releases.holdings(name, rollout.from_version).ready,
            needed=model.policy.min_ready_replicas,
        )
        match rollouts.decide(rollout, seen):
            case None:
                return False
            case Move.BACK, why:
                await self._back(model, why, ROLLOUT, guard)
            case Move.AWAIT_VERDICT, why:
                rollout.waited, rollout.detail = True, why
                timed = await self._timed(rollout, rollouts.verdict_timeout_s(rollout))
                await self._commits.commit(timed.puts, (*timed.only_if, fence))
            case Move.ADVANCE, why:
                await self._advance(model, why, guard)
            case Move.FINISH, why:
                rollout.state, rollout.detail = rollouts.SUCCEEDED, why
                after = traffic.all_to(model, rollout.version)
                basis = self._releases.basis(model, after)
                await self._onward(model, after, why, basis, self._ended(rollout), guard)
        return True

    def check_idle(self, model: models_pb2.Model) -> None:
        """Raises RolloutRunning."""
        if running(model.rollout):
            raise RolloutRunning(
                f'version {model.rollout.version} of "{model.name}" is being rolled out (step '
                f"{model.rollout.step + 1} of {len(model.rollout.plan.steps)}): wait, abort it, or roll back"
            )

    def settled(self, model: models_pb2.Model, caller: Caller) -> Extra:
        """For a release by hand: a running rollout ends with it, and none begins meanwhile."""
        if not running(model.rollout):
            return Extra(only_if=tuple(self._commits.unchanged(keyspace.model(model.name, "rollout"))))
        rollout = model.rollout
        rollout.state = rollouts.ENDED
        rollout.detail = f"rolled back by {caller.client or 'a caller without a key'}"
        return self._ended(rollout)

    async def _advance(self, model: models_pb2.Model, why: str, guard: Extra) -> None:
        rollout = model.rollout
        rollout.step += 1
        rollout.waited, rollout.detail = False, why
        rollout.step_time.GetCurrentTime()
        percent = rollout.plan.steps[rollout.step].percent
        copies = rollout.plan.shadow_percent
        after = traffic.canary(model, rollout.from_version, rollout.version, percent, copies)
        basis = self._releases.basis(model, after)
        timed = await self._timed(rollout, rollouts.wait_s(rollout))
        await self._onward(model, after, why, basis, timed, guard)

    async def _onward(
        self, model: models_pb2.Model, after: models_pb2.Traffic, why: str, *extras: Extra
    ) -> None:
        asked = Asked(models_pb2.RELEASE_KIND_ROLLOUT, ROLLOUT, why)
        await self._releases.carry_out(model, traffic.onward(model, after), asked, *extras)

    async def _back(
        self, model: models_pb2.Model, why: str, caller: Caller, guard: Extra
    ) -> rollouts_pb2.Rollout:
        rollout = model.rollout
        rollout.state, rollout.detail = rollouts.ROLLED_BACK, why
        state = traffic.back(model, self._releases.history(model.name))
        asked = Asked(models_pb2.RELEASE_KIND_ROLLOUT, caller, why)
        basis = self._releases.basis(model, state.traffic)
        done = await self._releases.carry_out(model, state, asked, basis, self._ended(rollout), guard)
        return done.rollout

    def _running(self, name: str, rollout_id: str) -> rollouts_pb2.Rollout:
        rollout = self._catalog.model(name).rollout
        if not rollout.id:
            raise NotFound(f'"{name}" has had no rollout')
        if rollout.id != rollout_id or not running(rollout):
            raise NotReady(f'the rollout {rollout_id} of "{name}" is not in progress: {rollout.detail}')
        return rollout

    async def _timed(self, rollout: rollouts_pb2.Rollout, seconds: int) -> Extra:
        """The rollout's record, and a timer that etcd ends."""
        written = self._ended(rollout)
        if not seconds:
            return written
        timer = Put(keyspace.model(rollout.model, "timer"), b"", await self._commits.lease(seconds))
        return Extra((*written.puts, timer), written.only_if)  # a Txn may not put and delete one key

    def _ended(self, rollout: rollouts_pb2.Rollout) -> Extra:
        """The rollout's record without a timer."""
        key, timer = keyspace.model(rollout.model, "rollout"), keyspace.model(rollout.model, "timer")
        put = Put(key, rollout.SerializeToString())
        return Extra((put,), tuple(self._commits.unchanged(key)), (timer,))
