"""The RPCs of MetricsService about alerts."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from services.core.errors import InvalidInput, NotReady
from services.core.identity import Callers
from services.core.interceptors import Context
from services.metrics.alerts import convert
from services.metrics.alerts.changes import Change
from services.metrics.alerts.engine import Engine, Health, described
from services.metrics.alerts.notices import fingerprint
from services.metrics.alerts.rules import Rule, Severity, summarised
from services.metrics.alerts.silences import silenced_by
from services.metrics.alerts.states import Alert, State, flapping
from services.metrics.tails import send

MAX_LISTED = 1000
MAX_OVERFLOWED = 10
_STATES = {state: alerts_pb2.AlertState.Value(f"ALERT_STATE_{state.name}") for state in State}
_HEALTHS = {health: alerts_pb2.RuleHealth.Value(f"RULE_HEALTH_{health.name}") for health in Health}
_WORST_FIRST = (Severity.CRITICAL, Severity.WARNING, Severity.INFO)
_FIRST = (State.FIRING, State.PENDING, State.RESOLVED)


class AlertRpcs:
    """Everybody may read. Where callers are known, who writes needs an admin key."""

    def __init__(self, alerts: Engine, callers: Callers, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._alerts, self._callers, self._now_ns = alerts, callers, now_ns

    async def CreateAlertRule(
        self, request: metrics_pb2.CreateAlertRuleRequest, context: Context
    ) -> metrics_pb2.CreateAlertRuleResponse:
        self._callers.check_admin(context.invocation_metadata(), "change rules of alerts")
        rule = convert.to_rule(request.rule)
        await self._alerts.book.create(rule)
        return metrics_pb2.CreateAlertRuleResponse(rule=self._rule(rule))

    async def UpdateAlertRule(
        self, request: metrics_pb2.UpdateAlertRuleRequest, context: Context
    ) -> metrics_pb2.UpdateAlertRuleResponse:
        self._callers.check_admin(context.invocation_metadata(), "change rules of alerts")
        rule = convert.to_rule(request.rule)
        await self._alerts.book.update(rule)
        return metrics_pb2.UpdateAlertRuleResponse(rule=self._rule(rule))

    async def DeleteAlertRule(
        self, request: metrics_pb2.DeleteAlertRuleRequest, context: Context
    ) -> metrics_pb2.DeleteAlertRuleResponse:
        self._callers.check_admin(context.invocation_metadata(), "change rules of alerts")
        await self._alerts.book.delete(request.name)
        return metrics_pb2.DeleteAlertRuleResponse()

    async def ListAlertRules(
        self, request: metrics_pb2.ListAlertRulesRequest, context: Context
    ) -> metrics_pb2.ListAlertRulesResponse:
        rules = self._alerts.book.rules().values()
        entries = [
            metrics_pb2.AlertRuleEntry(rule=self._rule(rule), status=self._status(rule)) for rule in rules
        ]
        return metrics_pb2.ListAlertRulesResponse(rules=entries)

    async def ListAlerts(
        self, request: alerts_pb2.ListAlertsRequest, context: Context
    ) -> alerts_pb2.ListAlertsResponse:
        if request.page_size > MAX_LISTED:
            raise InvalidInput("page_size", f"is at most {MAX_LISTED:,}")
        limit = request.page_size or MAX_LISTED
        found = self._found(request)
        unknown = [name for name in self._alerts.book.rules() if self._is_unknown(name)]
        now = self._now_ns()
        return alerts_pb2.ListAlertsResponse(
            alerts=[self._alert(rule, alert, now) for rule, alert in found[:limit]],
            truncated=len(found) > limit,
            unknown_rules=unknown,
        )

    async def WatchAlerts(
        self, request: alerts_pb2.WatchAlertsRequest, context: Any
    ) -> AsyncIterator[alerts_pb2.WatchAlertsResponse]:
        wanted = set(request.states)

        def is_wanted(change: Change) -> bool:
            states = {_STATES[change.before], _STATES[change.alert.state]}
            return request.rule in ("", change.rule.name) and (not wanted or bool(wanted & states))

        with self._alerts.changes.following(is_wanted) as tail:
            now = self._now_ns()
            for rule, alert in self._found(request):
                alert_now = self._alert(rule, alert, now)
                await send(context, alerts_pb2.WatchAlertsResponse(alert=alert_now))
            await send(context, alerts_pb2.WatchAlertsResponse(current=True))
            while True:
                for change in await tail.take():
                    changed = self._alert(change.rule, change.alert, self._now_ns())
                    before = _STATES[change.before]
                    await send(context, alerts_pb2.WatchAlertsResponse(alert=changed, before=before))
        yield  # a handler that writes to its context by itself still has to be a generator

    async def CreateSilence(
        self, request: alerts_pb2.CreateSilenceRequest, context: Context
    ) -> alerts_pb2.CreateSilenceResponse:
        metadata = context.invocation_metadata()
        self._callers.check_admin(metadata, "silence alerts")
        author = self._callers.of(metadata).client
        silence = convert.to_silence(request.silence, uuid.uuid4().hex[:12], author, self._now_ns())
        await self._alerts.book.silence(silence)
        return alerts_pb2.CreateSilenceResponse(silence=convert.from_silence(silence))

    async def DeleteSilence(
        self, request: alerts_pb2.DeleteSilenceRequest, context: Context
    ) -> alerts_pb2.DeleteSilenceResponse:
        self._callers.check_admin(context.invocation_metadata(), "silence alerts")
        await self._alerts.book.unsilence(request.id)
        return alerts_pb2.DeleteSilenceResponse()

    async def ListSilences(
        self, request: alerts_pb2.ListSilencesRequest, context: Context
    ) -> alerts_pb2.ListSilencesResponse:
        found = self._alerts.book.silences(self._now_ns())
        return alerts_pb2.ListSilencesResponse(silences=[convert.from_silence(silence) for silence in found])

    async def TestWebhook(
        self, request: alerts_pb2.TestWebhookRequest, context: Context
    ) -> alerts_pb2.TestWebhookResponse:
        self._callers.check_admin(context.invocation_metadata(), "test the webhook")
        if not self._alerts.has_webhook:
            raise NotReady("there is no webhook: set LINGQU_ALERTS_WEBHOOK of the metrics service")
        begun = time.perf_counter()
        status = await self._alerts.test_webhook()
        took = convert.duration(time.perf_counter() - begun)
        return alerts_pb2.TestWebhookResponse(status=status, took=took)

    def _found(
        self, request: alerts_pb2.ListAlertsRequest | alerts_pb2.WatchAlertsRequest
    ) -> list[tuple[Rule, Alert]]:
        wanted = set(request.states)
        found = (
            (rule, alert)
            for rule, alert in self._alerts.alerts()
            if request.rule in ("", rule.name) and (not wanted or _STATES[alert.state] in wanted)
        )
        return sorted(found, key=_order)

    def _rule(self, rule: Rule) -> metrics_pb2.AlertRule:
        return convert.from_rule(rule, self._alerts.book.is_default(rule.name))

    def _is_unknown(self, name: str) -> bool:
        return self._alerts.status(name).health is Health.UNKNOWN

    def _status(self, rule: Rule) -> metrics_pb2.AlertRuleStatus:
        status = self._alerts.status(rule.name)
        found = metrics_pb2.AlertRuleStatus(
            error=status.error,
            every=convert.duration(self._alerts.every_s(rule)),
            overflowed=len(status.overflowed),
            overflowed_series=[
                " ".join(f"{name}={value}" for name, value in series)
                for series in status.overflowed[:MAX_OVERFLOWED]
            ],
        )
        if status.health is not None:
            found.health = _HEALTHS[status.health]
        if status.evaluated_ns:
            found.evaluated_time.CopyFrom(convert.timestamp(status.evaluated_ns))
            found.took.CopyFrom(convert.duration(status.took_s))
        return found

    def _alert(self, rule: Rule, alert: Alert, now_ns: int) -> alerts_pb2.Alert:
        full = described(rule, alert.labels)
        found = alerts_pb2.Alert(
            rule=rule.name,
            labels=dict(full),
            state=_STATES[alert.state],
            severity=convert.SEVERITY_NUMBERS[rule.severity],
            value=alert.value,
            summary=summarised(rule, dict(alert.labels), alert.value),
            since_time=convert.timestamp(alert.since_ns),
            fingerprint=fingerprint(full),
            flapping=flapping(alert, now_ns),
            silenced_by=silenced_by(dict(full), self._alerts.book.silences(now_ns), now_ns),
            unknown=self._is_unknown(rule.name),
        )
        for name, at in (("fired_time", alert.fired_ns), ("resolved_time", alert.resolved_ns)):
            if at:
                getattr(found, name).CopyFrom(convert.timestamp(at))
        return found


def _order(found: tuple[Rule, Alert]) -> tuple[int, int, str, tuple[tuple[str, str], ...]]:
    rule, alert = found
    return _FIRST.index(alert.state), _WORST_FIRST.index(rule.severity), rule.name, alert.labels
