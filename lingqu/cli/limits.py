"""`lingqu limits …`: how much a client, a model, or a client of a model may use."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Annotated

import typer

from lingqu.cli.clients import call, described
from lingqu.cli.connection import Suite
from lingqu.cli.output import Format, Output, plain, print_json, table
from lingqu.registry.v1 import access_pb2

app = typer.Typer(help="Limits of clients and models.", no_args_is_help=True)
LOCAL, GLOBAL = access_pb2.Limits.SCOPE_LOCAL, access_pb2.Limits.SCOPE_GLOBAL
OfClient = Annotated[str, typer.Option("--client", help="Name of a client; none: all clients together.")]
OfModel = Annotated[
    str,
    typer.Option("--model", help="Name of a model; beside --client with '*' for any text; none: all models."),
]
Limit = Annotated[int | None, typer.Option(help="0: no limit.", min=0)]
Row = tuple[str, str, access_pb2.Limits]


class Scope(enum.StrEnum):
    gateway = "local"
    everywhere = "global"


@app.command("list")
def list_(context: typer.Context, output: Output = Format.table) -> None:
    """All limits."""
    _print(list(_rows(context.obj)), output)


@app.command()
def show(
    context: typer.Context, client: OfClient = "", model: OfModel = "", output: Output = Format.table
) -> None:
    """The limits of a client, a model, or of a client's requests to a model."""
    rows = [row for row in _rows(context.obj) if row[0] in ("", client) or not client]
    _print([row for row in rows if not model or row[1] in ("", model)], output)


@app.command("set")
def set_(
    context: typer.Context,
    client: OfClient = "",
    model: OfModel = "",
    requests_per_second: Limit = None,
    requests_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    tokens_per_minute: Limit = None,
    tokens_per_day: Limit = None,
    scope: Annotated[
        Scope | None,
        typer.Option(help="Who counts requests: each gateway for itself, or all together (default)."),
    ] = None,
    output: Output = Format.table,
) -> None:
    """Change limits; what is not named stays."""
    given = {
        "requests_per_second": requests_per_second,
        "requests_per_minute": requests_per_minute,
        "concurrent_requests": concurrent_requests,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "scope": None if scope is None else LOCAL if scope is Scope.gateway else GLOBAL,
    }
    changed = {field: value for field, value in given.items() if value is not None}
    suite: Suite = context.obj
    if client:
        limits = _change_client(suite, client, model, changed)
    else:
        limits = _change_model(suite, _named(model), changed)
    _print([(client, model, limits)], output)


@app.command()
def delete(
    context: typer.Context, client: OfClient = "", model: OfModel = "", output: Output = Format.table
) -> None:
    """Take limits away."""
    suite: Suite = context.obj
    if client:
        known = call(suite, lambda stub: stub.GetClient, access_pb2.GetClientRequest(name=client)).client
        if model:
            kept = [entry for entry in known.model_limits if entry.models != model]
            del known.model_limits[:]
            known.model_limits.extend(kept)
        else:
            known.ClearField("limits")
        request = access_pb2.SetClientRequest(client=known, expected_revision=known.revision)
        call(suite, lambda stub: stub.SetClient, request)
    else:
        gone = access_pb2.DeleteSharedLimitsRequest(model=_named(model))
        call(suite, lambda stub: stub.DeleteSharedLimits, gone)
    _print([(client, model, access_pb2.Limits())], output)


def _change_client(suite: Suite, name: str, models: str, changed: dict[str, int]) -> access_pb2.Limits:
    client = call(suite, lambda stub: stub.GetClient, access_pb2.GetClientRequest(name=name)).client
    limits = client.limits
    if models:
        known = (entry for entry in client.model_limits if entry.models == models)
        limits = (next(known, None) or client.model_limits.add(models=models)).limits
    _apply(limits, changed)
    request = access_pb2.SetClientRequest(client=client, expected_revision=client.revision)
    call(suite, lambda stub: stub.SetClient, request)
    return limits  # type: ignore[no-any-return]


def _change_model(suite: Suite, model: str, changed: dict[str, int]) -> access_pb2.Limits:
    known = call(
        suite, lambda stub: stub.ListSharedLimits, access_pb2.ListSharedLimitsRequest()
    ).shared_limits
    shared = next((s for s in known if s.model == model), access_pb2.SharedLimits(model=model))
    _apply(shared.limits, changed)
    request = access_pb2.SetSharedLimitsRequest(shared_limits=shared, expected_revision=shared.revision)
    answer = call(suite, lambda stub: stub.SetSharedLimits, request).shared_limits
    return answer.limits  # type: ignore[no-any-return]


def _apply(limits: access_pb2.Limits, changed: dict[str, int]) -> None:
    limits.SetInParent()
    for field, value in changed.items():
        setattr(limits, field, value)


def _named(model: str) -> str:
    if not model:
        raise typer.BadParameter("--client, --model or both are needed")
    return model


def _rows(suite: Suite) -> Iterator[Row]:
    """(client, models, limits), empty for all of them."""
    for client in call(suite, lambda stub: stub.ListClients, access_pb2.ListClientsRequest()).clients:
        yield client.name, "", client.limits
        yield from ((client.name, entry.models, entry.limits) for entry in client.model_limits)
    shared = call(suite, lambda stub: stub.ListSharedLimits, access_pb2.ListSharedLimitsRequest())
    yield from (("", entry.model, entry.limits) for entry in shared.shared_limits)


def _print(rows: list[Row], output: Format) -> None:
    if output == Format.json:
        print_json(
            [
                {"client": client, "model": model, "limits": plain(limits)}
                for client, model, limits in rows
                if limits.ByteSize()
            ]
        )
        return
    cells = [(client or "all", models or "all", described(limits)) for client, models, limits in rows]
    table(
        ("CLIENT", "MODELS", "LIMITS"),
        [cell for cell in cells if cell[2]],
        "no limits; `lingqu limits set` adds some",
    )
