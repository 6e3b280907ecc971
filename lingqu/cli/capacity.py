"""`lingqu capacity`: what a model can take, from what was measured of it."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from rich.markup import escape

from lingqu.cli.arguments import duration
from lingqu.cli.connection import METRICS_PORT, Suite, out, run
from lingqu.cli.output import Format, Output, as_json, table
from lingqu.cli.sizes import footprint
from lingqu.metrics.v1 import capacity_pb2 as pb
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub

LIMITS = {
    pb.CAPACITY_LIMIT_NONE: "nothing: the load is served as asked",
    pb.CAPACITY_LIMIT_THROUGHPUT: "throughput: more comes than the replicas can do",
    pb.CAPACITY_LIMIT_LATENCY: "latency: sharing and waiting; more replicas help",
    pb.CAPACITY_LIMIT_SERVICE_TIME: "service time: a request alone takes longer, however many replicas. "
    "Allow more time, ask for fewer tokens, or use a faster engine",
    pb.CAPACITY_LIMIT_KV_CACHE: "the KV cache: a larger one (LINGQU_KV_CACHE_GIB) lets more sequences in",
}
Latency = Annotated[str, typer.Option(help="That it may not exceed, like 800ms or 2s.")]


def capacity(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model.")],
    rps: Annotated[
        float | None,
        typer.Option(
            help="Requests a second over all replicas; default: as in the last five minutes.", min=0
        ),
    ] = None,
    p50: Latency = "",
    p95: Latency = "",
    p99: Latency = "",
    version: Annotated[int, typer.Option(help="Default: the one that was asked most.", min=0)] = 0,
    replicas: Annotated[
        int, typer.Option(help="How many there would be; default: as there are.", min=0, max=1000)
    ] = 0,
    window: Annotated[str, typer.Option(help="Learn from so long until now: 5m, 1h, 2d.")] = "1h",
    output: Output = Format.table,
) -> None:
    """How busy a model is, how long requests will take at a load, and how many replicas it needs.

    Learnt from real traffic: how many tokens a second a replica makes with so many requests at once, and how
    many a request takes. A queueing model tells the rest; what it says of the load that was measured is
    printed beside what clients had, so that its error can be seen. With too little traffic it says so.

    lingqu capacity smollm2-135m-instruct                        # as it is now

    lingqu capacity smollm2-135m-instruct --rps 50 --p95 800ms   # would it do, and if not, what would?
    """
    learnt = duration(window)
    if learnt is None:
        raise typer.BadParameter(f'"{window}" is not like 30m, 1h or 2d', param_hint="--window")
    request = pb.GetCapacityRequest(model=model, version=version, replicas=replicas, window=learnt)
    if rps is not None:
        request.rps = rps
    for percentile, text in ((50, p50), (95, p95), (99, p99)):
        if text:
            request.objectives.add(percentile=percentile, latency=_latency(f"--p{percentile}", text))

    async def work(suite: Suite) -> Any:
        async with suite.channel(METRICS_PORT) as channel:
            return await MetricsServiceStub(channel).GetCapacity(request, timeout=30)

    answer = run(work(context.obj))
    if output == Format.json:
        as_json(answer)
    else:
        _print(answer, model, bool(request.objectives), footprint(context.obj, model, answer.version))


def _print(answer: Any, model: str, objectives: bool, memory: tuple[int, int] | None) -> None:
    """`memory`: bytes of a replica, and of a token in its KV cache; None if that is not known here."""
    used, sequence = answer.utilization, answer.tokens + answer.prompt_tokens
    needed = answer.replicas_needed
    rows = [
        ("load", f"{answer.rps:.4g} requests/s on {_replicas(answer.replicas)}"),
        ("utilisation", f"{used:.0%}" + (" (overload)" if used >= 1 else "")),
        ("can do", f"{answer.max_rps:.4g} requests/s"),
    ]
    if objectives:
        rows.append(("… as asked", f"{answer.max_rps_within_objectives:.4g} requests/s"))
    rows += [
        ("headroom", f"{answer.headroom_rps:+.4g} requests/s"),
        ("latency", _latencies(answer, "latency") or "grows without end"),
        ("… alone", _latencies(answer, "bare_latency")),
        ("replicas needed", str(needed) if needed else "no number is enough"),
        ("limited by", LIMITS[answer.limit]),
    ]
    if memory is not None:
        replica, of_token = memory
        kv = of_token * sequence * answer.concurrency
        rows.append(
            (
                "memory",
                f"{_mib(replica)} a replica (estimated)"
                + (f", {_mib(int(kv))} of KV cache in use at {answer.concurrency} sequences" if kv else "")
                + (f"; {_mib(replica * needed)} for {_replicas(needed)}" if needed else ""),
            )
        )
    rows += [
        ("learnt from", f"{answer.requests} requests of v{answer.version}, {sequence:.0f} tokens each"),
        ("measured", f"{answer.measured_rps:.4g} requests/s; {answer.peak_rps:.4g} in the busiest minute"),
    ]
    if answer.HasField("measured_latency"):
        rows.append(("… latency", _latencies(answer, "measured_latency")))
        if answer.HasField("expected_latency"):
            rows.append(("… by the model", _latencies(answer, "expected_latency")))
    table((model, ""), rows, "")
    for note in answer.notes:
        out.print(f"[yellow]·[/yellow] {escape(note)}")


def _latencies(answer: Any, field: str) -> str:
    if not answer.HasField(field):
        return ""
    found = getattr(answer, field)
    parts = (
        (name, getattr(found, name).seconds + getattr(found, name).nanos / 1e9)
        for name in ("p50", "p95", "p99")
    )
    return ", ".join(
        f"{name} {time * 1000:,.3g} ms" if time < 1 else f"{name} {time:,.3g} s" for name, time in parts
    )


def _latency(option: str, text: str) -> Duration:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text)
    if found is None or float(found[1]) <= 0:
        raise typer.BadParameter(f'"{text}" is not like 800ms or 2s', param_hint=option)
    nanos = round(float(found[1]) * (1_000_000 if found[2] == "ms" else 1_000_000_000))
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def _replicas(number: int) -> str:
    return "1 replica" if number == 1 else f"{number} replicas"


def _mib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
