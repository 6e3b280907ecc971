"""Follows the registry's rollouts, what Envoy tells of their requests and inference of their answers, and
reports what comes of it. Without a registry, or while nothing is rolled out, there is nothing to follow."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from lingqu.metrics.v1 import answers_pb2, answers_pb2_grpc
from lingqu.registry.v1 import models_pb2, rollouts_pb2
from lingqu.registry.v1.rollouts_pb2_grpc import RolloutServiceStub
from services.core.errors import LingquError
from services.core.interceptors import Context
from services.core.registry import NO_ANSWER, Registry, Watched
from services.core.tasks import background
from services.metrics.accesslog import DRAWN_FIELD, REQUESTS, WELL
from services.metrics.intake import Intake
from services.metrics.points import Point
from services.metrics.readings import Reading
from services.metrics.tails import SlowTail, Tails
from services.metrics.verdicts import convert
from services.metrics.verdicts.answers import Answer, Pair, Pairs
from services.metrics.verdicts.archive import Archive, plain
from services.metrics.verdicts.convert import Rollout
from services.metrics.verdicts.trial import Opinion, Trial

log = logging.getLogger(__name__)

BLOCK_S = 1.0
# How often figures are reported where the opinion is the same: each report is a write that all watchers see.
FIGURES_S = 10.0
TIMEOUT_S = 5.0
# How often evidence is written down; at a clean stop, too.
KEPT_S = 5.0
MAX_TRIALS = 256
COMPARED = "answers.compared"
# Of nobody's making: the caller left, or asked for what cannot be.
UNJUDGED = frozenset(
    {
        "CANCELLED",
        "INVALID_ARGUMENT",
        "RESOURCE_EXHAUSTED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "NOT_FOUND",
    }
    | {"FAILED_PRECONDITION", "OUT_OF_RANGE", "ABORTED", "ALREADY_EXISTS"}
    | {str(status) for status in range(400, 500)}
)


@dataclass(slots=True)
class _Told:
    """The last report of a trial."""

    step: int = -1
    opinion: Opinion = Opinion.NONE
    at_s: float = 0.0


class Judge:
    """`key` is an API key to report with, for models whose policy names who may; empty: none."""

    def __init__(
        self, registry: Registry, intake: Intake, tails: Tails[Point], archive: Archive, key: str = ""
    ) -> None:
        self._registry, self._intake, self._tails, self._archive = registry, intake, tails, archive
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._pairs = Pairs()
        self._trials: dict[str, Trial] = {}
        self._by_model: dict[str, Trial] = {}
        self._told: dict[str, _Told] = {}
        self._changed = asyncio.Event()
        self._judging = asyncio.Event()
        self._kept_s = 0.0
        self._rollouts: Watched[Rollout | None] = Watched(
            registry, self._watch, lambda record: (record.name, convert.to_rollout(record)), self._changed
        )

    def take(self, answers: Iterable[Answer]) -> None:
        """What two versions answered is a point of `answers.compared`, and evidence if it is a rollout's."""
        readings: list[Reading] = []
        for answer in answers:
            pair = self._pairs.take(answer, time.monotonic())
            if pair is None:
                continue
            if (trial := self._by_model.get(pair.model)) is not None:
                trial.take_pair(pair)
            if pair.difference is not None:
                readings.append(_reading(pair, time.time_ns() + len(readings)))
        if self._pairs.dropped:
            self._intake.note("refused", "answer without its other", self._pairs.dropped)
            self._pairs.dropped = 0
        if readings:
            self._intake.take(readings)

    async def run(self) -> None:
        """For ever."""
        kept = await asyncio.to_thread(self._archive.read)
        async with background(self._rollouts.run(), self._follow()):
            await self._rollouts.synced.wait()
            self._trials = kept
            try:
                while True:
                    await self._turn()
                    await asyncio.sleep(BLOCK_S)
            finally:
                self._keep([plain(trial) for trial in self._trials.values()])

    async def _turn(self) -> None:
        """One block: what came in, what is thought of it, who has to know."""
        judged = self._judged()
        for _, trial in judged:
            trial.close()
        now = time.monotonic()
        if judged and now - self._kept_s >= KEPT_S:
            self._kept_s = now
            await asyncio.to_thread(self._keep, [plain(trial) for _, trial in judged])
        for rollout, trial in judged:
            if not await self._report(rollout, trial):
                break  # others would wait in vain as well

    def _keep(self, trials: list[dict[str, Any]]) -> None:
        try:
            self._archive.keep(trials)
        except LingquError as err:
            log.warning("%s; a restart would begin to judge anew", err)

    def _judged(self) -> list[tuple[Rollout, Trial]]:
        """Every rollout in progress with its trial; those of others are forgotten."""
        running = sorted((r for r in self._rollouts.items.values() if r is not None), key=lambda r: r.id)
        trials = {}
        for rollout in running[:MAX_TRIALS]:
            trial = self._trials.get(rollout.id)
            if trial is None or trial.terms != rollout.terms:
                trial = Trial(rollout.id, rollout.model, rollout.version, rollout.before, rollout.terms)
            trial.at(rollout.step)
            trials[rollout.id] = trial
        self._trials = trials
        self._by_model = {trial.model: trial for trial in trials.values()}
        self._told = {name: told for name, told in self._told.items() if name in trials}
        if trials:
            self._judging.set()
        else:
            self._judging.clear()
        return [(rollout, trials[rollout.id]) for rollout in running[:MAX_TRIALS]]

    async def _follow(self) -> None:
        """Requests, while something is judged."""
        while True:
            await self._judging.wait()
            try:
                async with aclosing(self._tails.follow(self._of_a_trial)) as points:
                    async for point in points:
                        self._take_request(point)
                        if not self._judging.is_set():
                            break
            except SlowTail:
                log.warning("requests came faster than they could be judged; some are left out")
            except LingquError as err:
                log.warning("requests are not judged: %s", err)
                await asyncio.sleep(BLOCK_S)

    def _of_a_trial(self, point: Point) -> bool:
        return point.measurement == REQUESTS and dict(point.labels).get("model") in self._by_model

    def _take_request(self, point: Point) -> None:
        labels = dict(point.labels)
        trial, version, status = (
            self._by_model.get(labels["model"]),
            labels.get("version", ""),
            labels.get("status"),
        )
        if trial is None or not version.isdigit() or status in UNJUDGED:
            return
        if DRAWN_FIELD in point.fields:  # failures that are told beside would outweigh what went well
            trial.take_request(int(version), status not in WELL, point.fields.get("duration"))

    async def _report(self, rollout: Rollout, trial: Trial) -> bool:
        """What is new, and the figures from time to time. False: the registry does not answer."""
        told = self._told.setdefault(rollout.id, _Told())
        opinion, why = trial.opinion() if rollout.judged else (Opinion.NONE, "")
        now, anew = time.monotonic(), told.step != rollout.step
        due = now - told.at_s >= FIGURES_S and trial.step_samples
        if not due and not ((anew or opinion != told.opinion) and opinion is not Opinion.NONE):
            return True
        request = rollouts_pb2.ReportVerdictRequest(
            model=rollout.model,
            rollout=rollout.id,
            step=rollout.step,
            verdict=convert.from_opinion(opinion),
            figures=trial.figures(),
            samples=trial.step_samples,
            detail=why,
        )
        channel = self._registry.channel
        stub: Any = RolloutServiceStub(channel)
        try:
            await stub.ReportVerdict(request, timeout=TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as err:
            if err.code() in NO_ANSWER:
                self._registry.leave(channel)
                return False
            if err.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # else the rollout has moved on
                log.warning('the verdict on "%s" is not taken: %s', rollout.model, err.details())
                self._told[rollout.id] = _Told(rollout.step, opinion, now)  # no sooner than figures
            return True
        if opinion is not told.opinion:
            log.info('verdict on "%s" version %d: %s %s', rollout.model, rollout.version, opinion.value, why)
        self._told[rollout.id] = _Told(rollout.step, opinion, now)
        return True

    def _watch(self, revision: int, store_id: str) -> Any:
        request = models_pb2.WatchModelsRequest(resume_revision=revision, store_id=store_id)
        return self._registry.models.WatchModels(request)


class Answers(answers_pb2_grpc.AnswerServiceServicer):
    """The handlers of AnswerService."""

    def __init__(self, judge: Judge | None) -> None:
        self._judge = judge

    async def ReportAnswers(
        self, request: answers_pb2.ReportAnswersRequest, context: Context
    ) -> answers_pb2.ReportAnswersResponse:
        answers = convert.to_answers(request)
        if self._judge is not None:
            self._judge.take(answers)
        return answers_pb2.ReportAnswersResponse()


def _reading(pair: Pair, time_ns: int) -> Reading:
    labels = {"model": pair.model, "version": str(pair.version), "before": str(pair.before)}
    labels["by"] = str(pair.kind)
    return Reading(COMPARED, labels, {"value": 1.0, "difference": pair.difference or 0.0}, time_ns)
