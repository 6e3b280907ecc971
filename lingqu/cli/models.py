"""`lingqu models …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lingqu.cli.connection import Suite, fail, out, run
from lingqu.publishing import Artifact, Publisher
from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub

GATEWAY_PORT = 8081
REGISTRY_PORT = 8082
STATES = {
    instances_pb2.HOSTED_STATE_LOADING: "loading",
    instances_pb2.HOSTED_STATE_READY: "ready",
    instances_pb2.HOSTED_STATE_FAILED: "failed",
}

app = typer.Typer(help="Versions of models: list, show, publish.", no_args_is_help=True)
Hosting = dict[tuple[str, int], list[tuple[str, Any]]]


@app.command("list")
def list_(context: typer.Context) -> None:
    """All models, which version takes the traffic, and where it runs."""
    models, hosting = run(read_models(context.obj))
    out.print(models_table(models, hosting) if models else "no models; `lingqu models publish` adds one")


@app.command()
def show(context: typer.Context, name: str) -> None:
    """One model with all its versions."""
    models, hosting = run(read_models(context.obj, name))
    if not models:
        fail(f'there is no model "{name}"; `lingqu models list` shows the names')
    for version in models[0].versions:
        where = [
            f"{i} {STATES[m.state]} {m.detail}".strip() for i, m in hosting.get((name, version.version), [])
        ]
        traffic = "takes the traffic" if version.version == models[0].traffic_version else "no traffic"
        out.print(f"[bold]{name} v{version.version}[/bold]  {traffic}")
        out.print(f"  task      {version.task} on {version.runtime}")
        out.print(f"  artifact  {version.artifact.uri} ({version.artifact.size_bytes / 1e6:.1f} MB)")
        out.print(f"  sha256    {version.artifact.sha256}")
        out.print(f"  created   {version.create_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC")
        for line in where or ["on no replica"]:
            out.print(f"  replica   {line}")


@app.command()
def publish(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the model; a new version if it exists.")],
    artifact: Annotated[Path, typer.Argument(help="Folder that `python -m pipeline` made.")],
    traffic: Annotated[
        bool, typer.Option(help="Give the version all traffic once it has proven itself.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="How long to wait for a replica, seconds.")] = 300.0,
) -> None:
    """Publish an artifact as a version: registered, loaded, proven, and only then given traffic."""
    found = Artifact.at(artifact) if (artifact / "manifest.json").is_file() else None
    if found is None:
        fail(f"{artifact} has no manifest.json; `python -m pipeline --help` shows how to make an artifact")

    async def work(suite: Suite) -> None:
        async with suite.channel(REGISTRY_PORT) as registry, suite.channel(GATEWAY_PORT) as gateway:
            publisher = Publisher(registry, gateway, suite.secret)
            await publisher.publish(name, found, traffic=traffic, timeout_s=timeout, tell=out.print)

    run(work(context.obj))


def models_table(models: list[models_pb2.Model], hosting: Hosting) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("MODEL", "VERSION", "TASK", "RUNTIME", "TRAFFIC", "REPLICAS"):
        table.add_column(column)
    for model in models:
        for version in model.versions:
            replicas = [f"{i} ({STATES[m.state]})" for i, m in hosting.get((model.name, version.version), [])]
            table.add_row(
                model.name,
                str(version.version),
                version.task,
                version.runtime,
                "100 %" if version.version == model.traffic_version else "–",
                ", ".join(replicas) or "–",
            )
    return table


async def read_models(suite: Suite, name: str = "") -> tuple[list[models_pb2.Model], Hosting]:
    """Models, and for each version the replicas that have it."""
    async with suite.channel(REGISTRY_PORT) as channel:
        listed: Any = await ModelServiceStub(channel).ListModelVersions(
            models_pb2.ListModelVersionsRequest(model=name), timeout=10
        )
        alive: Any = await RegistryServiceStub(channel).ListInstances(
            instances_pb2.ListInstancesRequest(service="inference"), timeout=10
        )
    hosting: Hosting = {}
    for instance in alive.instances:
        for hosted in instance.models:
            hosting.setdefault((hosted.model, hosted.version), []).append((instance.id, hosted))
    return list(listed.models), hosting
