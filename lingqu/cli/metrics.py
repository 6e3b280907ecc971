"""`lingqu metrics …`: what the suite did and does, from its metrics service."""

from __future__ import annotations

import csv
import enum
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.markup import escape

from lingqu.cli.arguments import Aggregate, duration
from lingqu.cli.connection import METRICS_PORT, Suite, err, out, run
from lingqu.cli.output import plain, print_json, table
from lingqu.metrics.v1 import metrics_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub

app = typer.Typer(help="What models, clients and this machine did.", no_args_is_help=True)

TREND_WINDOWS = 32
_BARS = "▁▂▃▄▅▆▇█"


class As(enum.StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="LABEL=VALUE[,VALUE…]: only series with it; may be repeated."),
]
Output = Annotated[As, typer.Option("--output", "-o", help="Table for people; JSON or CSV for programs.")]


@app.command()
def query(
    context: typer.Context,
    measurement: Annotated[str, typer.Argument(help="As `lingqu metrics list` names it.")],
    field: Annotated[str, typer.Option(help="Field of the measurement.")] = "value",
    aggregate: Annotated[
        Aggregate, typer.Option("--aggregate", "-a", help="Of the values.")
    ] = Aggregate.MEAN,
    percentile: Annotated[
        float | None, typer.Option(help="A percentile in place of an aggregate, above 0, at most 100.")
    ] = None,
    p50: Annotated[bool, typer.Option("--p50", help="--percentile 50.")] = False,
    p95: Annotated[bool, typer.Option("--p95", help="--percentile 95.")] = False,
    p99: Annotated[bool, typer.Option("--p99", help="--percentile 99.")] = False,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="A series for each value of this label; may be repeated.")
    ] = None,
    where: Where = None,
    since: Annotated[str, typer.Option(help="From so long ago: 30s, 5m, 1h, 2d.")] = "1h",
    until: Annotated[str, typer.Option(help="Until so long ago.")] = "0s",
    window: Annotated[
        str, typer.Option(help="A value for every so long; without it one for the whole range.")
    ] = "",
    output: Output = As.table,
) -> None:
    """Values of a field over time."""
    given = [number for wanted, number in ((p50, 50.0), (p95, 95.0), (p99, 99.0)) if wanted]
    given += [] if percentile is None else [percentile]
    if len(given) > 1:
        raise typer.BadParameter("one of --percentile, --p50, --p95 and --p99")
    now = time.time_ns()
    start, end = (now - _seconds(text) * 1_000_000_000 for text in (since, until))
    question = pb.QueryRequest(
        measurement=measurement,
        field=field,
        filters=_filters(where),
        start_time=_time(start),
        end_time=_time(end),
        aggregate=pb.AGGREGATE_PERCENTILE if given else pb.Aggregate.Value(f"AGGREGATE_{aggregate.name}"),
        percentile=given[0] if given else 0.0,
        group_by=list(by or ()),
    )
    windowed = pb.QueryRequest()
    windowed.CopyFrom(question)
    each = _seconds(window) if window else max(1, math.ceil((end - start) / 1e9 / TREND_WINDOWS))
    windowed.window.CopyFrom(Duration(seconds=each))

    async def work(suite: Suite) -> tuple[Any, Any]:
        async with suite.channel(METRICS_PORT) as channel:
            stub = MetricsServiceStub(channel)
            whole = (
                pb.QueryResponse()
                if window and output != As.table
                else await stub.Query(question, timeout=30)
            )
            trend = pb.QueryResponse()
            if window or output == As.table:
                trend = await stub.Query(windowed, timeout=30)
            return whole, trend

    whole, trend = run(work(context.obj))
    if output == As.table:
        name = f"P{given[0]:g}" if given else aggregate.name
        _print_table(whole, trend, list(by or ()), name, (start // 10**9, end // 10**9))
    elif output == As.json:
        print_json([plain(series) for series in (trend if window else whole).series])
    else:
        _print_csv(trend if window else whole, list(by or ()))
    if whole.truncated or trend.truncated:
        err.print("[yellow]there are more series than are shown: use --where[/yellow]")


@app.command("list")
def list_(
    context: typer.Context,
    measurement: Annotated[str, typer.Argument(help="Only of this one.")] = "",
    output: Output = As.table,
) -> None:
    """Measurements and their series."""

    async def work(suite: Suite) -> Any:
        async with suite.channel(METRICS_PORT) as channel:
            request = pb.ListSeriesRequest(measurement=measurement)
            return await MetricsServiceStub(channel).ListSeries(request, timeout=30)

    answer = run(work(context.obj))
    rows = [(series.measurement, _labels(series.labels)) for series in answer.series]
    if output == As.json:
        print_json([plain(series) for series in answer.series])
    elif output == As.csv:
        _csv(("measurement", "labels"), rows)
    else:
        table(("MEASUREMENT", "LABELS"), rows, "nothing was measured yet")
    if answer.truncated:
        err.print("[yellow]there are more: name a measurement[/yellow]")


@app.command()
def tail(
    context: typer.Context,
    measurement: Annotated[str, typer.Argument(help="Only of this one.")] = "",
    where: Where = None,
    number: Annotated[
        int, typer.Option("--number", "-n", help="End after so many points; 0: never.", min=0)
    ] = 0,
    output: Output = As.table,
) -> None:
    """Points as they come in, until Ctrl-C."""
    request = pb.TailRequest(measurement=measurement, filters=_filters(where))

    async def work(suite: Suite) -> None:
        async with suite.channel(METRICS_PORT) as channel:
            told = 0
            async for point in MetricsServiceStub(channel).Tail(request):
                _print_point(point, output)
                told += 1
                if told == number:
                    return

    run(work(context.obj))


def _print_point(point: Any, output: As) -> None:
    at = f"{datetime.fromtimestamp(point.time.seconds, UTC):%H:%M:%S}.{point.time.nanos // 1_000_000:03d}"
    if output == As.json:
        typer.echo(json.dumps(plain(point), ensure_ascii=False))
    elif output == As.csv:
        for name in sorted(point.fields):
            _csv_rows(
                [(_when(point.time), point.measurement, _labels(point.labels), name, point.fields[name])]
            )
    else:
        fields = " ".join(f"{name}={point.fields[name]:.6g}" for name in sorted(point.fields))
        labels = escape(_labels(point.labels))
        out.print(
            f"[dim]{at}[/dim] [bold]{escape(point.measurement)}[/bold] {labels} [dim]·[/dim] {escape(fields)}"
        )


def _print_table(whole: Any, trend: Any, by: Sequence[str], name: str, within: tuple[int, int]) -> None:
    trends = {_key(series, by): series for series in trend.series}
    rows = []
    for series in whole.series:
        key = _key(series, by)
        samples = trends[key].samples if key in trends else []
        value = series.samples[-1].value if series.samples else math.nan
        rows.append((*key, f"{value:.6g}", sparkline(samples, *within)))
    columns = [*(label.upper() for label in by), name, "TREND"]
    table(columns, rows, "no values; `lingqu metrics list` shows what there is")


def sparkline(samples: Sequence[Any], first: int, last: int, width: int = TREND_WINDOWS) -> str:
    """Bars from 0, or the least if that is lower, to the greatest value; blanks where there is none. Of
    several in one place the greatest is shown."""
    cells: list[float | None] = [None] * width
    for sample in samples:
        at = min(width - 1, max(0, (sample.time.seconds - first) * width // max(1, last - first)))
        before = cells[at]
        cells[at] = sample.value if before is None else max(before, sample.value)
    known = [value for value in cells if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(" " if value is None else _BARS[round((value - low) / step)] for value in cells).rstrip()


def _print_csv(answer: Any, by: Sequence[str]) -> None:
    rows = [
        (_when(sample.time), *_key(series, by), repr(sample.value))
        for series in answer.series
        for sample in series.samples
    ]
    _csv(("time", *by, "value"), rows)


def _csv(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    _csv_rows([columns, *rows])


def _csv_rows(rows: Iterable[Iterable[object]]) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    sys.stdout.flush()


def _key(series: Any, by: Sequence[str]) -> tuple[str, ...]:
    return tuple(series.labels.get(label, "") for label in by)


def _labels(labels: Any) -> str:
    return " ".join(f"{name}={labels[name]}" for name in sorted(labels))


def _filters(where: Sequence[str] | None) -> list[pb.Filter]:
    found = []
    for text in where or ():
        label, sign, values = text.partition("=")
        if not label or not sign:
            raise typer.BadParameter(f'"{text}" is not like model=a or status=OK,UNAVAILABLE')
        found.append(pb.Filter(label=label, values=values.split(",")))
    return found


def _seconds(text: str) -> int:
    found = duration(text)
    if found is None:
        raise typer.BadParameter(f'"{text}" is not like 30s, 5m, 1h or 2d')
    return int(found.seconds)


def _time(ns: int) -> Timestamp:
    return Timestamp(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000)


def _when(time: Timestamp) -> str:
    return time.ToJsonString()
