"""`lingqu limits …`: how much a client, a tier of clients, a model, or a client of a model may use."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Annotated, TypeAlias

import typer

from lingqu.cli.clients import call, described
from lingqu.cli.connection import Suite
from lingqu.cli.output import Format, Output, plain, print_json, table
from lingqu.registry.v1 import access_pb2

app = typer.Typer(help="Limits of clients, tiers and models.", no_args_is_help=True)
OfClient = Annotated[str, typer.Option("--client", help="Name of a client; none: all clients together.")]
OfModel = Annotated[
    str,
    typer.Option("--model", help="Name of a model; beside --client with '*' for any text; none: all models."),
]
OfTier = Annotated[
    str,
    typer.Option("--tier", help="Name of a tier: of each client in it; made when it gets its first limit."),
]
Limit = Annotated[int | None, typer.Option(help="0: no limit.", min=0)]
Holder: TypeAlias = "access_pb2.Client | access_pb2.Tier"
# Client, tier, models, limits: empty for all of them.
Row = tuple[str, str, str, access_pb2.Limits]


class Scope(enum.StrEnum):
    gateway = "local"
    everywhere = "global"


SCOPES = {Scope.gateway: access_pb2.Limits.SCOPE_LOCAL, Scope.everywhere: access_pb2.Limits.SCOPE_GLOBAL}
OfRate = Annotated[Scope | None, typer.Option(help="The same for this rate alone.")]


@app.command("list")
def list_(context: typer.Context, output: Output = Format.table) -> None:
    """All limits."""
    _print(list(_rows(context.obj)), output)


@app.command()
def show(
    context: typer.Context,
    client: OfClient = "",
    model: OfModel = "",
    tier: OfTier = "",
    output: Output = Format.table,
) -> None:
    """The limits of a client, a tier, a model, or of a client's requests to a model."""
    rows = [row for row in _rows(context.obj) if not tier or row[1] == tier]
    rows = [row for row in rows if not client or row[0] in ("", client)]
    _print([row for row in rows if not model or row[2] in ("", model)], output)


@app.command("set")
def set_(
    context: typer.Context,
    client: OfClient = "",
    model: OfModel = "",
    tier: OfTier = "",
    requests_per_second: Limit = None,
    requests_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    tokens_per_minute: Limit = None,
    tokens_per_day: Limit = None,
    scope: Annotated[
        Scope | None,
        typer.Option(help="Who counts both rates: each gateway for itself, or all together (default)."),
    ] = None,
    requests_per_second_scope: OfRate = None,
    requests_per_minute_scope: OfRate = None,
    output: Output = Format.table,
) -> None:
    """Change limits; what is not named stays."""
    given = {
        "requests_per_second": requests_per_second,
        "requests_per_minute": requests_per_minute,
        "concurrent_requests": concurrent_requests,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    changed = {field: value for field, value in given.items() if value is not None}
    if scope is not None:
        changed |= {"scope": SCOPES[scope], "requests_per_second_scope": 0, "requests_per_minute_scope": 0}
    of_rates = {
        "requests_per_second_scope": requests_per_second_scope,
        "requests_per_minute_scope": requests_per_minute_scope,
    }
    changed |= {field: SCOPES[own] for field, own in of_rates.items() if own is not None}
    suite: Suite = context.obj
    if client or tier:
        holder = _holder(suite, client, tier)
        limits = _of(holder, model)
        _apply(limits, changed)
        _set(suite, holder)
    else:
        limits = _change_model(suite, _named(model), changed)
    _print([(client, tier, model, limits)], output)


@app.command()
def delete(
    context: typer.Context,
    client: OfClient = "",
    model: OfModel = "",
    tier: OfTier = "",
    output: Output = Format.table,
) -> None:
    """Take limits away; a tier with all that it has, once no client is in it."""
    suite: Suite = context.obj
    if tier and not model:
        call(suite, lambda stub: stub.DeleteTier, access_pb2.DeleteTierRequest(name=tier))
    elif client or tier:
        holder = _holder(suite, client, tier)
        if model:
            kept = [entry for entry in holder.model_limits if entry.models != model]
            del holder.model_limits[:]
            holder.model_limits.extend(kept)
        else:
            holder.ClearField("limits")
        _set(suite, holder)
    else:
        gone = access_pb2.DeleteSharedLimitsRequest(model=_named(model))
        call(suite, lambda stub: stub.DeleteSharedLimits, gone)
    _print([(client, tier, model, access_pb2.Limits())], output)


def _holder(suite: Suite, client: str, tier: str) -> Holder:
    """The record of a client, or of a tier, new perhaps."""
    if client and tier:
        raise typer.BadParameter(
            "--client or --tier, not both: `lingqu clients set --tier` puts a client into one"
        )
    if client:
        asked = access_pb2.GetClientRequest(name=client)
        return call(suite, lambda stub: stub.GetClient, asked).client  # type: ignore[no-any-return]
    known = call(suite, lambda stub: stub.ListTiers, access_pb2.ListTiersRequest()).tiers
    return next((found for found in known if found.name == tier), access_pb2.Tier(name=tier))


def _of(holder: Holder, models: str) -> access_pb2.Limits:
    if not models:
        return holder.limits
    known = (entry for entry in holder.model_limits if entry.models == models)
    return (next(known, None) or holder.model_limits.add(models=models)).limits


def _set(suite: Suite, holder: Holder) -> None:
    if isinstance(holder, access_pb2.Tier):
        tier = access_pb2.SetTierRequest(tier=holder, expected_revision=holder.revision)
        call(suite, lambda stub: stub.SetTier, tier)
    else:
        client = access_pb2.SetClientRequest(client=holder, expected_revision=holder.revision)
        call(suite, lambda stub: stub.SetClient, client)


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
        raise typer.BadParameter("--client, --tier or --model is needed")
    return model


def _rows(suite: Suite) -> Iterator[Row]:
    for client in call(suite, lambda stub: stub.ListClients, access_pb2.ListClientsRequest()).clients:
        yield client.name, "", "", client.limits
        yield from ((client.name, "", entry.models, entry.limits) for entry in client.model_limits)
    for tier in call(suite, lambda stub: stub.ListTiers, access_pb2.ListTiersRequest()).tiers:
        yield "", tier.name, "", tier.limits
        yield from (("", tier.name, entry.models, entry.limits) for entry in tier.model_limits)
    shared = call(suite, lambda stub: stub.ListSharedLimits, access_pb2.ListSharedLimitsRequest())
    yield from (("", "", entry.model, entry.limits) for entry in shared.shared_limits)


def _print(rows: list[Row], output: Format) -> None:
    if output == Format.json:
        print_json(
            [
                {"client": client, "tier": tier, "model": model, "limits": plain(limits)}
                for client, tier, model, limits in rows
                if limits.ByteSize()
            ]
        )
        return
    cells = [
        (client or (f"tier {tier}" if tier else "all"), models or "all", described(limits))
        for client, tier, models, limits in rows
    ]
    table(
        ("CLIENT", "MODELS", "LIMITS"),
        [cell for cell in cells if cell[2]],
        "no limits; `lingqu limits set` adds some",
    )
