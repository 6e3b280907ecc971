"""`lingqu rollouts …`: automatic canaries."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from rich.markup import escape

from lingqu.cli.arguments import bounded, duration
from lingqu.cli.connection import REGISTRY_PORT, Suite, fail, out, run
from lingqu.cli.models import Name, Number, Reason, Timeout, publishing
from lingqu.cli.output import Format, Output, as_json, table, when
from lingqu.publishing import Publisher, patient
from lingqu.registry.v1 import rollouts_pb2
from lingqu.registry.v1.rollouts_pb2_grpc import RolloutServiceStub

_OPINIONS = {
    rollouts_pb2.VERDICT_UNSPECIFIED: "no opinion",
    rollouts_pb2.VERDICT_PASS: "pass",
    rollouts_pb2.VERDICT_FAIL: "fail",
}

app = typer.Typer(
    help="Automatic canaries: a version gets traffic step by step, and loses it when something is wrong.",
    no_args_is_help=True,
)


@app.command()
def start(
    context: typer.Context,
    name: Name,
    version: Number,
    step: Annotated[
        list[str] | None,
        typer.Option(help="PERCENT:WAIT, as 10:5m; repeatable. Default: 5:10m, 25:10m, 50:10m."),
    ] = None,
    shadow: Annotated[
        int,
        typer.Option(
            help="Percent of the requests to the other version that are copied to it, to compare answers.",
            min=0,
            max=100,
        ),
    ] = 0,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="What the metrics service allows, as slowdown=2, cosine_distance=0.05 or off; repeatable."
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(help="Figure of the verdicts, as error_rate<=0.02 or agreement>=0.98@500; repeatable."),
    ] = None,
    require_pass: Annotated[
        bool, typer.Option("--require-pass", help="Each step needs a verdict of PASS.")
    ] = False,
    timeout: Annotated[str, typer.Option(help="How long a step may lack its verdict.")] = "1h",
    reason: Reason = "",
    load_timeout: Timeout = 120.0,
    output: Output = Format.table,
) -> None:
    """Start a rollout: `lingqu rollouts start m 2 --step 10:5m --guard 'error_rate<=0.02@100'`.

    With `--shadow 100 --step 0:10m --step 10:5m` it begins with copies only, whose answers nobody sees.
    """
    steps = [_step(text) for text in step or ("5:10m", "25:10m", "50:10m")]
    plan = rollouts_pb2.RolloutPlan(
        steps=steps,
        guards=[_guard(text) for text in guard or ()],
        require_pass=require_pass,
        verdict_timeout=_duration(timeout),
        shadow_percent=shadow,
        judgement=_judgement(judge or ()),
    )
    request = rollouts_pb2.StartRolloutRequest(
        model=name, version=version, plan=plan, reason=reason, request_id=uuid.uuid4().hex
    )

    async def work(publisher: Publisher) -> Any:
        return await publisher.released(
            name, [version], load_timeout, lambda: _called(context.obj, lambda s: s.StartRollout, request)
        )

    _tell(publishing(context.obj, work).rollout, output)


@app.command("list")
def list_(context: typer.Context, output: Output = Format.table) -> None:
    """The running or last rollout of every model."""
    request = rollouts_pb2.ListRolloutsRequest()
    rollouts = _call(context.obj, lambda stub: stub.ListRollouts, request).rollouts
    if output == Format.json:
        as_json(rollouts)
        return
    rows = [
        (r.model, f"v{r.from_version} → v{r.version}", _state(r), _progress(r), r.detail) for r in rollouts
    ]
    table(("MODEL", "VERSIONS", "STATE", "STEP", "WHY"), rows, "no rollouts yet")


@app.command()
def show(context: typer.Context, name: Name, output: Output = Format.table) -> None:
    """The running or last rollout of a model."""
    request = rollouts_pb2.GetRolloutRequest(model=name)
    _tell(_call(context.obj, lambda stub: stub.GetRollout, request).rollout, output)


@app.command()
def abort(context: typer.Context, name: Name, reason: Reason = "", output: Output = Format.table) -> None:
    """End a running rollout and go back."""
    request = rollouts_pb2.AbortRolloutRequest(model=name, reason=reason)
    _tell(_call(context.obj, lambda stub: stub.AbortRollout, request).rollout, output)


@app.command()
def verdict(
    context: typer.Context,
    name: Name,
    opinion: Annotated[str, typer.Argument(help="pass, fail, or none: only the figures count.")] = "none",
    figure: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE that was measured; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(help="From how many requests.", min=0)] = 0,
    detail: Annotated[str, typer.Option(help="For people.")] = "",
    output: Output = Format.table,
) -> None:
    """Say what was measured of the step in progress."""
    opinions = {
        "pass": rollouts_pb2.VERDICT_PASS,
        "fail": rollouts_pb2.VERDICT_FAIL,
        "none": rollouts_pb2.VERDICT_UNSPECIFIED,
    }
    if opinion not in opinions:
        fail(f'"{opinion}" is none of pass, fail, none')
    rollout = _call(
        context.obj, lambda stub: stub.GetRollout, rollouts_pb2.GetRolloutRequest(model=name)
    ).rollout
    request = rollouts_pb2.ReportVerdictRequest(
        model=name,
        rollout=rollout.id,
        step=rollout.step,
        verdict=opinions[opinion],
        figures=dict(_figure(text) for text in figure or ()),
        samples=samples,
        detail=detail,
    )
    _tell(_call(context.obj, lambda stub: stub.ReportVerdict, request).rollout, output)


def _call(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    return run(_called(suite, method, request))


async def _called(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    async with suite.channel(REGISTRY_PORT) as channel:
        stub: Any = RolloutServiceStub(channel)
        return await patient(lambda: method(stub)(request, timeout=10, metadata=suite.metadata))


def _tell(rollout: rollouts_pb2.Rollout, output: Format) -> None:
    if output == Format.json:
        as_json(rollout)
        return
    out.print(
        f"[bold]{rollout.model}[/bold]  v{rollout.from_version} → v{rollout.version}  {_state(rollout)}"
    )
    for index, step in enumerate(rollout.plan.steps):
        running = rollout.state == rollouts_pb2.ROLLOUT_STATE_RUNNING and index == rollout.step
        mark = f"← since {when(rollout.step_time)} UTC" if running else ""
        share = f"{step.percent} %" if step.percent else "copies only,"
        out.print(f"  step {index + 1}    {share} for {step.wait.seconds} s {mark}".rstrip())
    if rollout.plan.shadow_percent:
        out.print(f"  copies    {rollout.plan.shadow_percent} % of what version {rollout.from_version} gets")
    for guard in rollout.plan.guards:
        low = f" ≥ {guard.min:g}" if guard.HasField("min") else ""
        high = f" ≤ {guard.max:g}" if guard.HasField("max") else ""
        out.print(f"  guard     {escape(guard.metric)}{low}{high}, from {guard.min_samples} samples on")
    if rollout.HasField("report"):
        figures = ", ".join(f"{name} {value:g}" for name, value in sorted(rollout.report.figures.items()))
        opinion = _OPINIONS[rollout.report.verdict]
        out.print(f"  report    {opinion}: {escape(figures)} from {rollout.report.samples} samples")
        if rollout.report.detail and rollout.state == rollouts_pb2.ROLLOUT_STATE_RUNNING:
            out.print(f"            {escape(rollout.report.detail)}")
    if rollout.detail:
        out.print(f"  {'waits' if rollout.waited else 'because'}   {escape(rollout.detail)}")


def _state(rollout: rollouts_pb2.Rollout) -> str:
    state = rollouts_pb2.RolloutState.Name(rollout.state)
    return state.removeprefix("ROLLOUT_STATE_").lower().replace("_", " ")


def _progress(rollout: rollouts_pb2.Rollout) -> str:
    return f"{rollout.step + 1} of {len(rollout.plan.steps)}"


def _duration(text: str) -> Duration:
    if (found := duration(text)) is None:
        fail(f'"{text}" is no duration such as 90s, 5m, 2h')
    return found


def _step(text: str) -> rollouts_pb2.RolloutStep:
    percent, _, wait = text.partition(":")
    if not percent.removesuffix("%").isdigit():
        fail(f'"{text}" is not PERCENT:WAIT, as 10:5m')
    return rollouts_pb2.RolloutStep(percent=int(percent.removesuffix("%")), wait=_duration(wait or "0s"))


def _judgement(given: Iterable[str]) -> rollouts_pb2.Judgement:
    known = rollouts_pb2.Judgement.DESCRIPTOR.fields_by_name
    found = rollouts_pb2.Judgement()
    for text in given:
        name, _, value = text.partition("=")
        if text == "off":
            found.off = True
            continue
        try:
            setattr(found, name, int(value) if name == "least" else float(value))
        except (AttributeError, ValueError):
            fail(
                f'"{text}" is not off, or NAME=NUMBER with one of {", ".join(n for n in known if n != "off")}'
            )
    return found


def _guard(text: str) -> rollouts_pb2.Guard:
    bound, _, samples = text.partition("@")
    if (found := bounded(bound)) is None or not (samples or "0").isdigit():
        fail(f'"{text}" is not like error_rate<=0.02 or agreement>=0.98@500')
    metric, low, high = found
    return rollouts_pb2.Guard(metric=metric, min=low, max=high, min_samples=int(samples or 0))


def _figure(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        fail(f'"{text}" is not NAME=VALUE')
