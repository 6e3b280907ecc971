"""`lingqu up`, `status` and `instances`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Annotated, Any

import typer
from rich.table import Table

from lingqu.cli.connection import REGISTRY_PORT, Suite, err, fail, out, run
from lingqu.cli.models import read_models
from lingqu.cli.modelview import hosted, models_table
from lingqu.cli.output import Format, Output, as_json
from lingqu.registry.v1 import instances_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub


def up(
    context: typer.Context,
    port_offset: Annotated[
        int, typer.Option(help="Added to every port, so that suites run side by side.", min=0, max=50000)
    ] = 0,
    otlp: Annotated[
        str,
        typer.Option(
            help="host:port of another OTLP/gRPC collector for spans and figures.",
            envvar="LINGQU_OTLP_ENDPOINT",
        ),
    ] = "",
    log_level: Annotated[str, typer.Option(help="Of the services: DEBUG, INFO, WARNING.")] = "INFO",
    bundled: Annotated[bool, typer.Option(help="Publish the bundled models.")] = True,
    tritons: Annotated[
        int,
        typer.Option(
            help="Tritons, each with an inference process: one for each GPU or memory node. The ports of the "
            "second are 1000 above those of the first, and so on.",
            min=1,
            max=8,
        ),
    ] = 1,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            help="TLS on the public port and between the parts, with certificates made in the state folder.",
        ),
    ] = False,
    metrics: Annotated[bool, typer.Option(help="Run the metrics service.")] = True,
) -> None:
    """Run the whole suite on this machine until Ctrl-C: etcd, registry, metrics, Triton, inference, gateway,
    Envoy."""
    try:
        from lingqu.cli.local import up as run_local
    except ImportError as error:
        fail(
            f"{error.name or error} is not installed; `lingqu up` needs: pip install 'lingqu[serve,pipeline]'"
        )
    suite: Suite = context.obj
    code = asyncio.run(run_local(suite, port_offset, otlp, log_level, bundled, tritons, tls, metrics))
    raise typer.Exit(code)


def status(context: typer.Context) -> None:
    """The parts of the local suite, the models, and where they run."""
    suite: Suite = context.obj
    body = suite.running()
    table = Table(box=None, header_style="bold")
    for column in ("PART", "STATE", "PID", "MEMORY", "PORTS", "RESTARTS"):
        table.add_column(column)
    for name, part in body["parts"].items():
        alive = part["pid"] is not None and _alive(part["pid"])
        table.add_row(
            name,
            "[green]running[/green]" if alive else "[red]down[/red]",
            str(part["pid"] or "–"),
            _memory(part["pid"]) if alive else "–",
            " ".join(map(str, part["ports"])),
            str(part["restarts"]),
        )
    out.print(table)
    models, hosting = run(read_models(suite))
    out.print(models_table(models, hosting) if models else "no models")


def instances(context: typer.Context, output: Output = Format.table) -> None:
    """All live instances, as the registry knows them."""

    async def work(suite: Suite) -> Any:
        async with suite.channel(REGISTRY_PORT) as channel:
            return await RegistryServiceStub(channel).ListInstances(
                instances_pb2.ListInstancesRequest(), timeout=10
            )

    answer = run(work(context.obj))
    if output == Format.json:
        as_json(answer)
        return
    table = Table(box=None, header_style="bold")
    for column in ("INSTANCE", "SERVICE", "ENDPOINTS", "MODELS"):
        table.add_column(column)
    for instance in answer.instances:
        endpoints = " ".join(f"{kind}={address}" for kind, address in sorted(instance.endpoints.items()))
        models = " ".join(map(hosted, instance.models))
        table.add_row(instance.id, instance.service, endpoints, models or "–")
    out.print(table)
    if answer.stale:
        err.print("[yellow]etcd is out of reach: this is the last known state[/yellow]")


def _memory(pid: int) -> str:
    """Resident memory of a process and its children; "–" without psutil, which comes with lingqu[serve]."""
    try:
        import psutil
    except ImportError:
        return "–"
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return "–"
    found = 0
    for one in family:
        with contextlib.suppress(psutil.Error):
            found += one.memory_info().rss
    return f"{found / (1 << 20):.0f} MiB"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
