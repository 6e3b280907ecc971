"""`lingqu clients …`: who may call which models, within which limits."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape

from lingqu.cli.connection import REGISTRY_PORT, Suite, out, run
from lingqu.cli.output import Format, Output, as_json, table
from lingqu.registry.v1 import access_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub

app = typer.Typer(help="Clients: allowed models and limits.", no_args_is_help=True)
LIMITS = {
    "requests_per_second": "req/s",
    "requests_per_minute": "req/min",
    "concurrent_requests": "at once",
    "tokens_per_minute": "tok/min",
    "tokens_per_day": "tok/day",
}
Client = Annotated[str, typer.Argument(help="Name of the client, as in its keys.")]


class Urgency(enum.StrEnum):
    """In the order of Client.Priority."""

    any = "any"
    interactive = "interactive"
    normal = "normal"
    batch = "batch"


Limit = Annotated[int | None, typer.Option(help="0: no limit.", min=0)]


@app.command("list")
def list_(context: typer.Context, output: Output = Format.table) -> None:
    """All clients."""
    clients = call(context.obj, lambda stub: stub.ListClients, access_pb2.ListClientsRequest()).clients
    if output == Format.json:
        as_json(clients)
        return
    rows = [
        (c.name, ", ".join(c.models) or "none", c.tier, described(c.limits), "disabled" if c.disabled else "")
        for c in clients
    ]
    table(("CLIENT", "MODELS", "TIER", "LIMITS", ""), rows, "no clients; `lingqu clients set` adds one")


@app.command()
def show(context: typer.Context, name: Client, output: Output = Format.table) -> None:
    """One client with everything."""
    client = call(context.obj, lambda stub: stub.GetClient, access_pb2.GetClientRequest(name=name)).client
    if output == Format.json:
        as_json(client)
        return
    state = "  [red]disabled: none of its keys works[/red]" if client.disabled else ""
    out.print(f"[bold]{escape(client.name)}[/bold]{state}")
    rows = [("models", ", ".join(client.models) or "none"), ("limits", described(client.limits) or "none")]
    if client.tier:
        rows.append(("tier", client.tier))
    if client.max_priority:
        rows.append(("most urgent", list(Urgency)[client.max_priority].value))
    rows += [(f"limits of {m.models}", described(m.limits) or "none") for m in client.model_limits]
    rows += [(f"label {key}", value) for key, value in sorted(client.labels.items())]
    for title, text in rows:
        out.print(f"  {escape(title)}: {escape(text)}")


@app.command("set")
def set_(
    context: typer.Context,
    name: Client,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model it may call, '*' for any text; repeatable; '' for none."),
    ] = None,
    tier: Annotated[
        str | None, typer.Option(help="Tier whose limits it has where it has none of its own; '' for none.")
    ] = None,
    requests_per_second: Limit = None,
    requests_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    tokens_per_minute: Limit = None,
    tokens_per_day: Limit = None,
    max_priority: Annotated[
        Urgency | None, typer.Option(help="The most urgent class of its requests; any: no bound.")
    ] = None,
    disabled: Annotated[bool | None, typer.Option(help="Refuse all its keys.")] = None,
    output: Output = Format.table,
) -> None:
    """Create a client, or change one; what is not named stays."""
    given = {
        "requests_per_second": requests_per_second,
        "requests_per_minute": requests_per_minute,
        "concurrent_requests": concurrent_requests,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    known = call(context.obj, lambda stub: stub.ListClients, access_pb2.ListClientsRequest()).clients
    client = next((c for c in known if c.name == name), access_pb2.Client(name=name))
    if model is not None:
        client.models[:] = [text for text in model if text]
    for field, value in given.items():
        if value is not None:
            setattr(client.limits, field, value)
    if tier is not None:
        client.tier = tier
    if max_priority is not None:
        client.max_priority = list(Urgency).index(max_priority)
    if disabled is not None:
        client.disabled = disabled
    request = access_pb2.SetClientRequest(client=client, expected_revision=client.revision)
    client = call(context.obj, lambda stub: stub.SetClient, request).client
    if output == Format.json:
        as_json(client)
        return
    models, limits = ", ".join(client.models) or "no models", described(client.limits) or "no limits"
    if client.tier:
        limits = f"tier {client.tier}" + (f", but {limits}" if described(client.limits) else "")
    out.print(f"{escape(name)}: {escape(models)}; {limits}{'; disabled' if client.disabled else ''}")


@app.command()
def delete(context: typer.Context, name: Client, output: Output = Format.table) -> None:
    """Forget a client."""
    request = access_pb2.DeleteClientRequest(name=name)
    answer = call(context.obj, lambda stub: stub.DeleteClient, request)
    if output == Format.json:
        as_json(answer)
    else:
        out.print(f"{escape(name)}: deleted")


def call(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    """One call of AccessService, with the suite's key."""

    async def work() -> Any:
        async with suite.channel(REGISTRY_PORT) as channel:
            return await method(AccessServiceStub(channel))(request, timeout=10, metadata=suite.metadata)

    return run(work())


def described(limits: access_pb2.Limits) -> str:
    """As text; empty without limits."""
    found = ((getattr(limits, field), unit, _scope(limits, field)) for field, unit in LIMITS.items())
    return ", ".join(f"{value:,} {unit}{scope}" for value, unit, scope in found if value)


def _scope(limits: access_pb2.Limits, field: str) -> str:
    own = getattr(limits, f"{field}_scope", None)  # other fields have no choice
    is_local = own is not None and (own or limits.scope) == limits.SCOPE_LOCAL
    return " (each gateway)" if is_local else ""
