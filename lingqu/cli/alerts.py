"""`lingqu alerts …`: what is wrong, the rules that say so, and silences."""

from __future__ import annotations

import asyncio
import enum
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.markup import escape

from lingqu.cli.arguments import Aggregate, duration
from lingqu.cli.connection import METRICS_PORT, Suite, err, fail, out, run
from lingqu.cli.output import Format, Output, as_json, plain, table, when
from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub

app = typer.Typer(
    help="What is wrong: alerts, their rules, and silences. Without a command: what fires.",
    invoke_without_command=True,
)
rules = typer.Typer(help="Rules of alerts: ours, and yours.", no_args_is_help=True)
app.add_typer(rules, name="rules")
TIMEOUT_S = 30.0
WATCH_AGAIN_S = 1.0

Name = Annotated[str, typer.Argument(help="As `lingqu alerts rules list` names it.")]
Everything = Annotated[
    bool, typer.Option("--all", help="Also what is pending, and what was resolved lately.")
]
OfRule = Annotated[str, typer.Option(help="Only of this rule.")]


class Severity(enum.StrEnum):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@app.callback()
def firing(context: typer.Context, output: Output = Format.table) -> None:
    """What is wrong: alerts, their rules, and silences. Without a command: what fires."""
    if context.invoked_subcommand is None:
        _list(context.obj, False, "", output)


@app.command("list")
def list_(
    context: typer.Context,
    everything: Everything = False,
    rule: OfRule = "",
    output: Output = Format.table,
) -> None:
    """Alerts that fire; the worst first."""
    _list(context.obj, everything, rule, output)


@app.command()
def watch(
    context: typer.Context,
    everything: Everything = False,
    rule: OfRule = "",
    output: Output = Format.table,
) -> None:
    """What fires, then every change, until Ctrl-C."""
    states = [] if everything else [alerts_pb2.ALERT_STATE_FIRING]
    run(_watch(context.obj, alerts_pb2.WatchAlertsRequest(states=states, rule=rule), output))


@rules.command("list")
def rules_list(context: typer.Context, output: Output = Format.table) -> None:
    """All rules, and whether their answer is known."""
    answer = _call(context.obj, lambda stub: stub.ListAlertRules, metrics_pb2.ListAlertRulesRequest())
    if output == Format.json:
        as_json(answer.rules)
        return
    rows = [
        (
            entry.rule.name,
            _lower(alerts_pb2.Severity, entry.rule.severity),
            entry.rule.WhichOneof("condition").replace("_", " "),
            getattr(entry.rule, entry.rule.WhichOneof("condition")).selection.measurement,
            "default" if entry.rule.default_rule else "yours",
            _lower(alerts_pb2.RuleHealth, entry.status.health, "RULE_HEALTH_")
            + (f": {entry.status.error}" if entry.status.error else "")
            + (f", {entry.status.overflowed} series too many" if entry.status.overflowed else ""),
        )
        for entry in answer.rules
    ]
    table(("RULE", "SEVERITY", "CONDITION", "OF", "WHOSE", "ANSWER"), rows, "no rules")


@rules.command("create")
def rules_create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the new rule; one of ours to take its place.")],
    measurement: Annotated[str, typer.Argument(help="As `lingqu metrics list` names it.")],
    above: Annotated[float | None, typer.Option(help="Wrong if the value is greater.")] = None,
    below: Annotated[float | None, typer.Option(help="Wrong if the value is less.")] = None,
    absent: Annotated[bool, typer.Option("--absent", help="Wrong if nothing comes.")] = False,
    objective: Annotated[
        float | None,
        typer.Option(help="Wrong if the error budget burns fast: share that is to be good, such as 0.999."),
    ] = None,
    bad: Annotated[
        list[str] | None, typer.Option(help="With --objective: LABEL=VALUE[,VALUE…] of what failed.")
    ] = None,
    burn: Annotated[
        list[str] | None,
        typer.Option(help="With --objective: LONG,SHORT,FACTOR. Default: 1h,5m,14.4 and 6h,30m,6."),
    ] = None,
    field: Annotated[str, typer.Option(help="Field of the measurement.")] = "value",
    aggregate: Annotated[
        Aggregate, typer.Option("--aggregate", "-a", help="Of the values.")
    ] = Aggregate.MEAN,
    percentile: Annotated[float | None, typer.Option(help="A percentile in place of an aggregate.")] = None,
    window: Annotated[str, typer.Option(help="Of how long: 30s, 5m, 1h.")] = "5m",
    change_over: Annotated[
        str, typer.Option(help="Compare how fast the value changes, a second, over so long.")
    ] = "",
    by: Annotated[
        list[str] | None, typer.Option("--by", help="An alert for each value of this label.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", help="LABEL=VALUE[,VALUE…]: only series with it.")
    ] = None,
    severity: Annotated[Severity, typer.Option(help="How bad it is.")] = Severity.WARNING,
    hold_for: Annotated[str, typer.Option("--for", help="Fire when it held for so long.")] = "0s",
    keep_firing: Annotated[str, typer.Option(help="Resolve when it did not hold for so long.")] = "0s",
    summary: Annotated[str, typer.Option(help="A line for people; {value} and {LABEL} are filled in.")] = "",
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE, on its alerts.")] = None,
    output: Output = Format.table,
) -> None:
    """A new rule; one of --above, --below, --absent and --objective says what is wrong.

    lingqu alerts rules create slow requests --field duration --percentile 95 --above 2 --by model --for 2m
    lingqu alerts rules create errors requests --objective 0.99 --bad status=UNAVAILABLE,INTERNAL --by model
    lingqu alerts rules create no-jobs jobs.done --absent --window 10m --severity critical
    """
    if sum((above is not None, below is not None, absent, objective is not None)) != 1:
        raise typer.BadParameter("one of --above, --below, --absent and --objective is needed")
    selection = metrics_pb2.Selection(
        measurement=measurement,
        field=field,
        filters=_filters(where),
        aggregate=metrics_pb2.AGGREGATE_PERCENTILE
        if percentile is not None
        else metrics_pb2.Aggregate.Value(f"AGGREGATE_{aggregate.name}"),
        percentile=percentile or 0.0,
        group_by=list(by or ()),
    )
    rule = metrics_pb2.AlertRule(
        name=name,
        severity=alerts_pb2.Severity.Value(f"SEVERITY_{severity.name}"),
        hold_for=_length(hold_for),
        keep_firing=_length(keep_firing),
        summary=summary,
        labels=dict(_pair(text) for text in label or ()),
    )
    compared: dict[str, Any] = {
        "selection": selection,
        "window": _length(window),
        "comparison": alerts_pb2.COMPARISON_BELOW if above is None else alerts_pb2.COMPARISON_ABOVE,
        "value": below if above is None else above,
    }
    if absent:
        condition = metrics_pb2.AbsenceCondition(selection=selection, window=_length(window))
        rule.absence.CopyFrom(condition)
    elif objective is not None:
        windows = [_burn_window(text) for text in burn or ("1h,5m,14.4", "6h,30m,6")]
        rule.burn_rate.CopyFrom(
            metrics_pb2.BurnRateCondition(
                selection=selection, bad=_filters(bad), objective=objective, windows=windows
            )
        )
    elif change_over:
        rule.change.CopyFrom(metrics_pb2.ChangeCondition(over=_length(change_over), **compared))
    else:
        rule.threshold.CopyFrom(metrics_pb2.ThresholdCondition(**compared))
    request = metrics_pb2.CreateAlertRuleRequest(rule=rule)
    answer = _call(context.obj, lambda stub: stub.CreateAlertRule, request)
    if output == Format.json:
        as_json(answer.rule)
    else:
        out.print(f"{answer.rule.name} is evaluated from now on; `lingqu alerts` shows what fires")


@rules.command("delete")
def rules_delete(context: typer.Context, name: Name) -> None:
    """Take a rule of yours away; what it had firing is resolved."""
    _call(context.obj, lambda stub: stub.DeleteAlertRule, metrics_pb2.DeleteAlertRuleRequest(name=name))
    out.print(f"{name} is gone")


@rules.command("disable")
def rules_disable(context: typer.Context, name: Name) -> None:
    """Do not evaluate a rule, ours or yours; what it had firing is resolved."""
    _set_disabled(context.obj, name, True)


@rules.command("enable")
def rules_enable(context: typer.Context, name: Name) -> None:
    """Evaluate a rule again."""
    _set_disabled(context.obj, name, False)


@app.command()
def silence(
    context: typer.Context,
    matchers: Annotated[
        list[str], typer.Argument(help="LABEL=VALUE, all of which have to fit; '*' stands for any text.")
    ],
    reason: Annotated[str, typer.Option(help="Why; others read it.")],
    length: Annotated[str, typer.Option("--for", help="For how long: 30m, 2h, 1d; at most 90d.")] = "2h",
    author: Annotated[str, typer.Option(help="Who wants it. Default: the client of the key.")] = "",
    output: Output = Format.table,
) -> None:
    """Tell nobody of alerts that fit.

    lingqu alerts silence alertname=queue-growing model='smollm2*' --for 2h --reason "load test"
    """
    until = Timestamp(seconds=int(time.time()) + _length(length).seconds)
    made = alerts_pb2.Silence(
        matchers=[alerts_pb2.Matcher(label=name, value=value) for name, value in map(_pair, matchers)],
        until=until,
        author=author,
        reason=reason,
    )
    request = alerts_pb2.CreateSilenceRequest(silence=made)
    answer = _call(context.obj, lambda stub: stub.CreateSilence, request).silence
    if output == Format.json:
        as_json(answer)
    else:
        out.print(f"silence {answer.id} until {when(answer.until)} UTC; `lingqu alerts unsilence` ends it")


@app.command()
def unsilence(
    context: typer.Context, id_: Annotated[str, typer.Argument(metavar="ID", help="Of the silence.")]
) -> None:
    """End a silence early."""
    _call(context.obj, lambda stub: stub.DeleteSilence, alerts_pb2.DeleteSilenceRequest(id=id_))
    out.print(f"silence {id_} has ended")


@app.command()
def silences(context: typer.Context, output: Output = Format.table) -> None:
    """Silences that have not ended."""
    answer = _call(context.obj, lambda stub: stub.ListSilences, alerts_pb2.ListSilencesRequest())
    if output == Format.json:
        as_json(answer.silences)
        return
    rows = [
        (
            found.id,
            " ".join(f"{matcher.label}={matcher.value}" for matcher in found.matchers),
            when(found.until),
            found.author,
            found.reason,
        )
        for found in answer.silences
    ]
    table(("ID", "FITS", "UNTIL", "AUTHOR", "REASON"), rows, "no silences")


@app.command("test")
def test_webhook(context: typer.Context) -> None:
    """Send a test to the webhook."""
    answer = _call(context.obj, lambda stub: stub.TestWebhook, alerts_pb2.TestWebhookRequest())
    took_ms = answer.took.ToMicroseconds() / 1000
    out.print(f"the webhook took it: HTTP {answer.status}, {took_ms:.0f} ms")


async def _watch(suite: Suite, request: alerts_pb2.WatchAlertsRequest, output: Format) -> None:
    """Begins again when the service does. Raises AioRpcError if it was not there at first."""
    came = False
    while True:
        try:
            async with suite.channel(METRICS_PORT) as channel:
                call = MetricsServiceStub(channel).WatchAlerts(request, metadata=suite.metadata)
                async for change in call:
                    came = True
                    _print_change(change, output)
        except grpc.aio.AioRpcError as error:
            if not came or error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise
        err.print("[yellow]the metrics service is away; watching again[/yellow]")
        await asyncio.sleep(WATCH_AGAIN_S)


def _print_change(change: Any, output: Format) -> None:
    if output == Format.json:
        typer.echo(json.dumps(plain(change), ensure_ascii=False))
    elif change.current:
        err.print("[dim]that is how things stand; changes follow[/dim]")
    else:
        severity, state, rule, labels, since, summary = map(str, _row(change.alert))
        before = _lower(alerts_pb2.AlertState, change.before, "ALERT_STATE_")
        came_from = f" (was {before})" if before else f" since {since}"
        words = f"[bold]{escape(rule)}[/bold] {escape(labels)}".strip()
        out.print(f"{datetime.now(UTC):%H:%M:%S} {severity} {words} {state}{came_from}: {escape(summary)}")


def _list(suite: Suite, everything: bool, rule: str, output: Format) -> None:
    states = [] if everything else [alerts_pb2.ALERT_STATE_FIRING]
    request = alerts_pb2.ListAlertsRequest(states=states, rule=rule)
    answer = _call(suite, lambda stub: stub.ListAlerts, request)
    if output == Format.json:
        as_json(answer.alerts)
    else:
        rows = [_row(alert) for alert in answer.alerts]
        columns = ("SEVERITY", "STATE", "RULE", "LABELS", "SINCE", "WHAT")
        table(
            columns, rows, "nothing is wrong" if not answer.unknown_rules else "nothing is known to be wrong"
        )
    if answer.unknown_rules:
        err.print(
            f"[yellow]unknown, since the store does not answer: {', '.join(answer.unknown_rules)}[/yellow]"
        )
    if answer.truncated:
        err.print("[yellow]there are more: use --rule[/yellow]")


def _row(alert: Any) -> Sequence[object]:
    notes = [
        word
        for word, fits in (
            ("silenced", alert.silenced_by),
            ("flapping", alert.flapping),
            ("unknown", alert.unknown),
        )
        if fits
    ]
    state = _lower(alerts_pb2.AlertState, alert.state, "ALERT_STATE_")
    shown = {name: value for name, value in alert.labels.items() if name not in ("alertname", "severity")}
    return (
        _lower(alerts_pb2.Severity, alert.severity),
        ", ".join((state, *notes)),
        alert.rule,
        " ".join(f"{name}={shown[name]}" for name in sorted(shown)),
        when(alert.fired_time if alert.HasField("fired_time") else alert.since_time),
        alert.summary,
    )


def _set_disabled(suite: Suite, name: str, disabled: bool) -> None:
    answer = _call(suite, lambda stub: stub.ListAlertRules, metrics_pb2.ListAlertRulesRequest())
    rule = next((entry.rule for entry in answer.rules if entry.rule.name == name), None)
    if rule is None:
        fail(f'there is no rule "{name}": see `lingqu alerts rules list`')
    rule.disabled = disabled
    _call(suite, lambda stub: stub.UpdateAlertRule, metrics_pb2.UpdateAlertRuleRequest(rule=rule))
    out.print(f"{name} is {'disabled' if disabled else 'evaluated again'}")


def _call(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    async def work() -> Any:
        async with suite.channel(METRICS_PORT) as channel:
            stub = MetricsServiceStub(channel)
            return await method(stub)(request, timeout=TIMEOUT_S, metadata=suite.metadata)

    return run(work())


def _lower(kind: Any, number: int, prefix: str = "SEVERITY_") -> str:
    name = str(kind.Name(number)).removeprefix(prefix).lower()
    return "" if name == "unspecified" else name


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise typer.BadParameter(f'"{text}" is not like model=a')
    return name, value


def _filters(where: Sequence[str] | None) -> list[metrics_pb2.Filter]:
    pairs = [_pair(text) for text in where or ()]
    return [metrics_pb2.Filter(label=name, values=value.split(",")) for name, value in pairs]


def _burn_window(text: str) -> metrics_pb2.BurnWindow:
    try:
        long, short, factor = text.split(",")
        return metrics_pb2.BurnWindow(long=_length(long), short=_length(short), factor=float(factor))
    except ValueError as error:
        raise typer.BadParameter(f'"{text}" is not like 1h,5m,14.4') from error


def _length(text: str) -> Duration:
    found = duration(text)
    if found is None:
        raise typer.BadParameter(f'"{text}" is not like 30s, 5m, 1h or 2d')
    return found
