"""Evaluates rules in turn and tells what comes of it; the decisions are in states.py and notices.py.

Rules are spread over their intervals and asked one at a time in a thread of their own: they are in the way
neither of what comes in nor of queries. What is told goes another way, so that a receiver that hangs holds up
nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from services.core.backoff import Backoff
from services.core.errors import LingquError
from services.metrics.alerts import notices, states
from services.metrics.alerts.archive import Archive, Known
from services.metrics.alerts.book import Book
from services.metrics.alerts.changes import Change, changes
from services.metrics.alerts.fresh import Asked
from services.metrics.alerts.notices import Group, Notice, Notification, Timing
from services.metrics.alerts.questions import Reading, questions, readings
from services.metrics.alerts.rules import Absence, Rule, summarised
from services.metrics.alerts.silences import silenced_by
from services.metrics.alerts.states import Alert, State
from services.metrics.alerts.webhook import Webhook, WebhookFailed
from services.metrics.points import Labels, labels
from services.metrics.tails import Tails

log = logging.getLogger(__name__)

TICK_S = 0.5
MAX_PAUSE_S = 60.0
SAVE_S = 60.0  # values and times of evaluation, which change all the time
MAX_GROUPS = 1000  # rules that were deleted and could not be told to be resolved yet are among them
NOTHING: Mapping[Labels, Alert] = MappingProxyType({})


class Health(StrEnum):
    OK = "ok"
    UNKNOWN = "unknown"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class Status:
    """How the last evaluation of a rule went; None: there was none."""

    health: Health | None = None
    error: str = ""
    evaluated_ns: int = 0
    took_s: float = 0.0
    overflowed: tuple[Labels, ...] = ()


class Engine:
    """For one event loop. `run` goes on for ever; `close` comes after it."""

    def __init__(
        self,
        store: Asked,
        archive: Archive,
        book: Book,
        webhook: Webhook | None = None,
        every_s: float = 15.0,
        timing: Timing | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store, self._archive, self.book, self._webhook = store, archive, book, webhook
        self._every_s, self._timing, self._now_ns = every_s, timing or Timing(), now_ns
        self._known: Known = archive.known()
        self.changes: Tails[Change] = Tails("changes of alerts")
        self._evaluated: dict[str, Rule] = {}
        self._status: dict[str, Status] = {}
        self._due: dict[str, float] = {}
        self._asking = ThreadPoolExecutor(1, "alerts")
        self._telling = ThreadPoolExecutor(1, "alerts-webhook")
        self._saving = asyncio.Lock()
        self._changed, self._unwritten = False, False
        self._pause, self._paused_until = Backoff(1.0, MAX_PAUSE_S), 0.0
        self._pauses: dict[str, tuple[Backoff, float]] = {}

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._evaluating())
                group.create_task(self._notifying())
        finally:
            try:
                self._archive.keep_known(self._snapshot())
            except LingquError as err:
                log.error("%s: alerts begin anew at the next start", err)  # noqa: TRY400

    def close(self) -> None:
        for threads in (self._asking, self._telling):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._webhook is not None:
            self._webhook.close()

    def status(self, name: str) -> Status:
        rule = self.book.rules().get(name)
        if rule is not None and rule.disabled:
            return Status(Health.DISABLED)
        return self._status.get(name, Status())

    def every_s(self, rule: Rule) -> float:
        return rule.every_s(self._every_s)

    def alerts(self) -> list[tuple[Rule, Alert]]:
        rules = self.book.rules()
        return [
            (rules[name], alert)
            for name, found in self._known.alerts.items()
            if name in rules
            for alert in found.values()
        ]

    async def test_webhook(self) -> int:
        """The status of HTTP. Raises WebhookFailed; the service knows that there is a webhook."""
        now = self._now_ns()
        what = labels({"alertname": "test", "severity": "info"})
        notice = Notice(what, "A test: nothing is wrong.", 0.0, now)
        return await self._tell(Notification("test", (notice,), ()))

    @property
    def has_webhook(self) -> bool:
        return self._webhook is not None

    async def _evaluating(self) -> None:
        loop = asyncio.get_running_loop()
        begun = saved = loop.time()
        while True:
            rules = {name: rule for name, rule in self.book.rules().items() if not rule.disabled}
            self._forget(rules)
            for name, rule in rules.items():
                if name not in self._due:
                    self._due[name] = max(loop.time() + self._phase_s(rule), begun + _watched_s(rule))
                if self._due[name] <= loop.time() and self.book.rules().get(name) is rule:
                    self._due[name] = loop.time() + self.every_s(rule)
                    await self.evaluate(rule)
            if self._known.alerts and loop.time() >= saved + SAVE_S:
                self._changed, saved = True, loop.time()
            await self._save()
            await asyncio.sleep(TICK_S)

    def _phase_s(self, rule: Rule) -> float:
        """Rules are apart from each other, and the same way each time."""
        return zlib.crc32(rule.name.encode()) / 2**32 * self.every_s(rule)

    async def evaluate(self, rule: Rule) -> None:
        """Once, now."""
        now, begun = self._now_ns(), time.perf_counter()
        error, found = "", None
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._asking, self._ask, rule, now)
        except LingquError as err:
            error = str(err)
        except Exception as err:
            error = f"{type(err).__name__}: the service's log has the details"
            log.exception("rule %s", rule.name)
        took_s = time.perf_counter() - begun
        if self.book.rules().get(rule.name) is not rule:
            return  # it was changed meanwhile
        before = self._known.alerts.get(rule.name, NOTHING)
        result = states.evaluate(rule, found, before, now)
        health = Health.OK if found is not None else Health.UNKNOWN
        last = self._status.get(rule.name, Status())
        if error and last.health is not Health.UNKNOWN:
            log.warning("rule %s is unknown: %s", rule.name, error)
        if result.overflowed and not last.overflowed:
            log.warning(
                "rule %s: %d series breach beyond the first %d, such as %s",
                rule.name, len(result.overflowed), states.MAX_ALERTS, result.overflowed[0],
            )  # fmt: skip
        overflowed = result.overflowed if found is not None else last.overflowed
        self._status[rule.name] = Status(health, error, now, took_s, overflowed)
        self._evaluated[rule.name] = rule
        self._tell_changes(changes(rule, before, result.alerts))
        if _lasting(before) != _lasting(result.alerts):
            self._changed = True
        if result.alerts:
            self._known.alerts[rule.name] = result.alerts
        else:
            self._known.alerts.pop(rule.name, None)

    def _ask(self, rule: Rule, now_ns: int) -> dict[Labels, Reading]:
        answers = [self._store.query(query) for query in questions(rule.condition, now_ns)]
        return readings(rule.condition, answers)

    def _tell_changes(self, found: list[Change]) -> None:
        """To the log, and to those who watch."""
        for change in found:
            rule, alert = change.rule, change.alert
            if State.FIRING in (change.before, alert.state):
                level = logging.WARNING if alert.state is State.FIRING else logging.INFO
                summary = summarised(rule, dict(alert.labels), alert.value)
                log.log(level, "alert %s (%s) is %s: %s", rule.name, rule.severity, alert.state, summary)
        if found:
            self.changes.publish(found)

    def _forget(self, rules: Mapping[str, Rule]) -> None:
        for name in [name for name in self._known.alerts if name not in rules]:
            gone = self._known.alerts.pop(name)
            self._changed = True
            if (rule := self._evaluated.get(name)) is not None:
                self._tell_changes(changes(rule, gone, NOTHING))
        self._evaluated = {name: rule for name, rule in self._evaluated.items() if name in rules}
        for name in [name for name in self._due if name not in rules]:
            del self._due[name]
            self._status.pop(name, None)

    async def _notifying(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._webhook is not None:
                for name in sorted({*self._known.alerts, *self._known.groups}):
                    try:
                        await self._notify(name)
                    except Exception:
                        log.exception("%s cannot be told", name)
                        self._pauses[name] = Backoff(MAX_PAUSE_S, MAX_PAUSE_S), loop.time() + MAX_PAUSE_S
            await asyncio.sleep(TICK_S)

    async def _notify(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < max(self._paused_until, self._pauses.get(name, (None, 0.0))[1]):
            return
        now = self._now_ns()
        firing, silenced = self._notices(name, now)
        group, notification = notices.due(
            name, self._known.groups.get(name, Group()), firing, silenced, now, self._timing
        )
        self._keep(name, group)
        if notification is None:
            return
        try:
            await self._tell(notification)
        except WebhookFailed as err:
            log.warning("%s; %s is told again later", err, name)
            if err.answered:
                backoff = self._pauses.get(name, (Backoff(1.0, MAX_PAUSE_S), 0.0))[0]
                self._pauses[name] = backoff, loop.time() + backoff.delay()
            else:
                self._paused_until = loop.time() + self._pause.delay()
            return
        self._pause.reset()
        self._pauses.pop(name, None)
        self._keep(name, notices.delivered(group, notification, self._now_ns()))
        await self._save()

    async def _tell(self, notification: Notification) -> int:
        assert self._webhook is not None  # noqa: S101 - callers have looked
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._telling, self._webhook.send, notification)

    def _keep(self, name: str, group: Group) -> None:
        if group == self._known.groups.get(name, Group()):
            return
        self._changed = True
        if group.told or group.waiting_ns:
            if name not in self._known.groups and len(self._known.groups) >= MAX_GROUPS:
                log.warning("%s is told when fewer of %d other rules wait to be told", name, MAX_GROUPS)
                return
            self._known.groups[name] = group
        else:
            self._known.groups.pop(name, None)

    def _notices(self, name: str, now_ns: int) -> tuple[dict[str, Notice], dict[str, Notice]]:
        """What fires of a rule, by fingerprint: to be told, and silenced."""
        firing: dict[str, Notice] = {}
        silenced: dict[str, Notice] = {}
        rule = self.book.rules().get(name)
        found: Iterable[Alert] = self._known.alerts.get(name, NOTHING).values() if rule is not None else ()
        for alert in found:
            if rule is None or alert.state is not State.FIRING:
                continue
            full = described(rule, alert.labels)
            summary = summarised(rule, dict(alert.labels), alert.value)
            notice = Notice(full, summary, alert.value, alert.fired_ns)
            quiet = silenced_by(dict(full), self.book.silences(now_ns), now_ns)
            (silenced if quiet else firing)[notice.fingerprint] = notice
        return firing, silenced

    async def _save(self) -> None:
        async with self._saving:
            if not self._changed:
                return
            self._changed = False
            try:
                await asyncio.to_thread(self._archive.keep_known, self._snapshot())
            except LingquError as err:
                self._changed = True
                if not self._unwritten:
                    log.warning("%s; trying again", err)
                self._unwritten = True
            else:
                self._unwritten = False

    def _snapshot(self) -> Known:
        return replace(self._known, alerts=dict(self._known.alerts), groups=dict(self._known.groups))


def _lasting(alerts: Mapping[Labels, Alert]) -> dict[Labels, Alert]:
    """Without what changes with each evaluation."""
    return {known: replace(alert, value=0.0, seen_ns=0) for known, alert in alerts.items()}


def _watched_s(rule: Rule) -> float:
    """Nothing is absent that could not have come yet, since the service was away itself."""
    return rule.condition.window_s if isinstance(rule.condition, Absence) else 0.0


def described(rule: Rule, series: Labels) -> Labels:
    """All labels of an alert. Empty ones are left out: for Prometheus they are the same as none."""
    own = {"alertname": rule.name, "severity": str(rule.severity)}
    return labels({name: value for name, value in {**dict(series), **rule.labels, **own}.items() if value})
