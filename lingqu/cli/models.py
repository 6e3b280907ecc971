"""`lingqu models …`: versions of models, and what they serve."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lingqu.artifacts import Artifact
from lingqu.cli.connection import GATEWAY_PORT, REGISTRY_PORT, Suite, err, fail, out, run
from lingqu.cli.modelview import STATES, Hosting, described, models_table, share, show_model, stage
from lingqu.cli.output import Format, Output, as_json
from lingqu.publishing import Publisher, patient
from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub

app = typer.Typer(help="Versions of models: publish, look, release, roll back.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of the model.")]
Number = Annotated[int, typer.Argument(help="Number of the version.", min=1)]
Reason = Annotated[str, typer.Option(help="Why; for the history.")]
Timeout = Annotated[float, typer.Option(help="How long to wait for replicas, seconds.")]


@app.command("list")
def list_(context: typer.Context, output: Output = Format.table) -> None:
    """All models, their versions, which take the traffic, and where they run."""
    models, hosting = run(read_models(context.obj))
    if output == Format.json:
        as_json(models)
        return
    out.print(models_table(models, hosting) if models else "no models; `lingqu models publish` adds one")


@app.command()
def show(context: typer.Context, name: Name, output: Output = Format.table) -> None:
    """One model: its traffic, its policy, and all its versions."""
    models, hosting = run(read_models(context.obj, name))
    if not models:
        fail(f'there is no model "{name}"; `lingqu models list` shows the names')
    if output == Format.json:
        as_json(models[0])
        return
    model = models[0]
    show_model(model)
    for version in model.versions:
        held = hosting.get((name, version.version), [])
        where = [f"{i} {STATES[m.state]} {m.detail}".strip() for i, m in held]
        part = share(model, version.version)
        out.print(f"[bold]{name} v{version.version}[/bold]  {part if part != '–' else 'no traffic'}")
        for label, text in described(version):
            out.print(f"  {label:<9} {escape(text)}")
        for line in where or ["on no replica"]:
            out.print(f"  replica   {escape(line)}")


@app.command()
def publish(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the model; a new version if it exists.")],
    artifact: Annotated[Path, typer.Argument(help="Folder that `python -m pipeline` made.")],
    traffic: Annotated[
        bool, typer.Option(help="Give the version all traffic once it has proven itself.")
    ] = True,
    store: Annotated[
        str,
        typer.Option(
            help="Copy the artifact there first: s3://…, gs://…, file://…; default: it stays where it is.",
            envvar="LINGQU_ARTIFACT_STORE",
        ),
    ] = "",
    key: Annotated[
        Path | None,
        typer.Option(
            help="Private key to sign with (PEM; made if it is not there). Default: the suite's own.",
            envvar="LINGQU_PUBLISHER_KEY",
        ),
    ] = None,
    timeout: Timeout = 300.0,
    output: Output = Format.table,
) -> None:
    """Publish an artifact as a version: registered, loaded, proven, and only then given traffic."""
    if not (artifact / "manifest.json").is_file():
        fail(f"{artifact} has no manifest.json; `python -m pipeline --help` shows how to make an artifact")
    suite: Suite = context.obj

    tell = (err if output == Format.json else out).print

    async def work(publisher: Publisher) -> int:
        found = Artifact.at(artifact)
        if store:
            found = found.push(store)
            tell(f"stored at {found.uri}")
        found = _signed(found, name, key or suite.state / "publisher.pem")
        return await publisher.publish(name, found, traffic=traffic, timeout_s=timeout, tell=tell)

    number = publishing(suite, work)
    if output == Format.json:
        request = models_pb2.GetModelVersionRequest(model=name, version=number)
        as_json(call(suite, lambda stub: stub.GetModelVersion, request).version)


@app.command()
def retire(
    context: typer.Context, name: Name, version: Number, reason: Reason = "", output: Output = Format.table
) -> None:
    """Take a version off all replicas. Its record stays, `restore` brings it back."""
    request = models_pb2.RetireModelVersionRequest(model=name, version=version, reason=reason)
    _tell(call(context.obj, lambda stub: stub.RetireModelVersion, request).version, output)


@app.command()
def restore(
    context: typer.Context, name: Name, version: Number, reason: Reason = "", output: Output = Format.table
) -> None:
    """Bring a retired or rejected version back: replicas load and prove it anew."""
    request = models_pb2.RestoreModelVersionRequest(model=name, version=version, reason=reason)
    _tell(call(context.obj, lambda stub: stub.RestoreModelVersion, request).version, output)


def _tell(version: models_pb2.ModelVersion, output: Format) -> None:
    if output == Format.json:
        as_json(version)
    else:
        out.print(f"{version.model} v{version.version}: {stage(version)}")


def call(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    """One call of ModelService with the caller's key."""
    return run(_called(suite, method, request))


def released(
    suite: Suite, method: Callable[[Any], Any], request: Any, versions: list[int], timeout_s: float
) -> Any:
    """The same for a release; versions that are not loaded for it are loaded first."""

    async def work(publisher: Publisher) -> Any:
        return await publisher.released(
            request.model, versions, timeout_s, lambda: _called(suite, method, request)
        )

    return publishing(suite, work)


async def _called(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    """Releases carry an id, so that trying again while the registry is away is safe."""
    if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:
        request.request_id = uuid.uuid4().hex
    async with suite.channel(REGISTRY_PORT) as channel:
        stub: Any = ModelServiceStub(channel)
        return await patient(lambda: method(stub)(request, timeout=10, metadata=suite.metadata))


def read_model(suite: Suite, name: str) -> models_pb2.Model:
    """Ends the command if there is none."""
    models, _ = run(read_models(suite, name))
    if not models:
        fail(f'there is no model "{name}"; `lingqu models list` shows the names')
    return models[0]


async def read_models(suite: Suite, name: str = "") -> tuple[list[models_pb2.Model], Hosting]:
    """Models, and for each version the replicas that have it."""
    async with suite.channel(REGISTRY_PORT) as channel:
        listed: Any = await ModelServiceStub(channel).ListModelVersions(
            models_pb2.ListModelVersionsRequest(model=name), timeout=10
        )
        alive: Any = await RegistryServiceStub(channel).ListInstances(
            instances_pb2.ListInstancesRequest(service="inference"), timeout=10
        )
    if listed.stale:
        err.print("[yellow]etcd is out of reach: this is the last known state[/yellow]")
    hosting: Hosting = {}
    for instance in alive.instances:
        for hosted in instance.models:
            hosting.setdefault((hosted.model, hosted.version), []).append((instance.id, hosted))
    return list(listed.models), hosting


def publishing(suite: Suite, work: Callable[[Publisher], Awaitable[Any]]) -> Any:
    async def connected() -> Any:
        async with suite.channel(REGISTRY_PORT) as registry, suite.channel(GATEWAY_PORT) as gateway:
            return await work(Publisher(registry, gateway, suite.secret))

    return run(connected())


def _signed(artifact: Artifact, name: str, key: Path) -> Artifact:
    try:
        from services.core.signing import Signer
    except ImportError as error:
        err.print(f"[dim]not signed: {error.name} is missing (pip install 'lingqu[publish]')[/dim]")
        return artifact
    return artifact.signed(Signer.at(key), name)
