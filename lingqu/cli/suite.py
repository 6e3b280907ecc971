"""`lingqu up`, `status`, `instances` and `keys`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from rich.markup import escape
from rich.table import Table

from lingqu.cli import clients
from lingqu.cli.connection import GATEWAY_PORT, REGISTRY_PORT, Suite, err, fail, out, run
from lingqu.cli.models import read_models
from lingqu.cli.modelview import hosted, models_table
from lingqu.cli.output import Format, Output, as_json, when
from lingqu.cli.output import table as show_table
from lingqu.gateway.v1 import gateway_pb2
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import access_pb2, instances_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub

keys = typer.Typer(help="API keys.", no_args_is_help=True)


def up(
    context: typer.Context,
    port_offset: Annotated[
        int, typer.Option(help="Added to every port, so that suites run side by side.", min=0, max=50000)
    ] = 0,
    otlp: Annotated[
        str,
        typer.Option(help="host:port of an OTLP/gRPC collector for spans.", envvar="LINGQU_OTLP_ENDPOINT"),
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
) -> None:
    """Run the whole suite on this machine until Ctrl-C: etcd, registry, Triton, inference, gateway, Envoy."""
    try:
        from lingqu.cli.local import up as run_local
    except ImportError as error:
        fail(
            f"{error.name or error} is not installed; `lingqu up` needs: pip install 'lingqu[serve,pipeline]'"
        )
    suite: Suite = context.obj
    code = asyncio.run(run_local(suite, port_offset, otlp, log_level, bundled, tritons))
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


@keys.command("create")
def create(
    context: typer.Context,
    client: Annotated[str, typer.Argument(help="Name of the client that will use the key.")],
    days: Annotated[int, typer.Option(help="Valid for so many days.", min=1, max=366)] = 30,
    admin: Annotated[
        bool, typer.Option(help="The key may also administer the gateway and the registry.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Sign a new API key. It is shown once and stored nowhere."""

    async def work(suite: Suite) -> Any:
        async with suite.channel(GATEWAY_PORT) as channel:
            request = gateway_pb2.CreateKeyRequest(
                client=client, ttl=Duration(seconds=days * 86400), admin=admin
            )
            metadata = (("authorization", f"Bearer {suite.secret}"),)
            return await GatewayServiceStub(channel).CreateKey(request, metadata=metadata, timeout=10)

    answer = run(work(context.obj))
    if output == Format.json:
        as_json(answer)
        return
    err.print(
        f"[dim]key {answer.key_id} for {client}, valid until {answer.expire_time.ToDatetime():%Y-%m-%d}[/dim]"
    )
    typer.echo(answer.key)


@keys.command("revoke")
def revoke(
    context: typer.Context,
    key_id: Annotated[
        str, typer.Argument(help="Id of the key, as `keys create` told it; not the key itself.")
    ],
    client: Annotated[str, typer.Option(help="Whose key it is, for the record.")] = "",
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    output: Output = Format.table,
) -> None:
    """Take a key back: it is refused from now on."""
    request = access_pb2.RevokeKeyRequest(key_id=key_id, client=client, reason=reason)
    key = clients.call(context.obj, lambda stub: stub.RevokeKey, request).key
    if output == Format.json:
        as_json(key)
    else:
        out.print(f"{escape(key.key_id)}: revoked")


@keys.command("revoked")
def revoked(context: typer.Context, output: Output = Format.table) -> None:
    """The keys that were taken back."""
    request = access_pb2.ListRevokedKeysRequest()
    answer = clients.call(context.obj, lambda stub: stub.ListRevokedKeys, request)
    if output == Format.json:
        as_json(answer.keys)
        return
    rows = [(k.key_id, k.client, when(k.revoke_time), k.reason) for k in answer.keys]
    show_table(("KEY", "CLIENT", "REVOKED (UTC)", "REASON"), rows, "no key was revoked")
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
