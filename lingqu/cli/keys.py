"""`lingqu keys …`: API keys, and the keys they are signed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from rich.markup import escape

from lingqu.cli import clients
from lingqu.cli.arguments import duration
from lingqu.cli.connection import GATEWAY_PORT, Suite, err, fail, out, run
from lingqu.cli.output import Format, Output, as_json, table, when
from lingqu.gateway.v1 import gateway_pb2 as pb
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import access_pb2

app = typer.Typer(
    help="""API keys: make, list and revoke them; rotate what signs them.

A key is shown once, when it is made, and kept nowhere: keep its id, which is no secret. It says whose it
is, until when it works and, if you like, for which models. All commands need a key with the admin scope, by
default the local suite's dev.key.

Examples:

  lingqu keys create alice --days 90                      a key for all that alice may call

  lingqu keys create ci --for 2h --model 'minilm-*'       two hours, some models

  lingqu keys revoke 3f0c9a12b4d5e6f7 --reason leaked     refused everywhere within a second

  lingqu keys rotate                                      once a quarter, say: nobody notices""",
    no_args_is_help=True,
)
KeyId = Annotated[str, typer.Argument(help="Id of the key, as `keys list` tells it; not the key itself.")]
STATES = {
    pb.SigningKey.STATE_SIGNING: "signs",
    pb.SigningKey.STATE_NEXT: "next",
    pb.SigningKey.STATE_FORMER: "former",
}


@app.command()
def create(
    context: typer.Context,
    client: Annotated[str, typer.Argument(help="Name of the client that will use the key.")],
    days: Annotated[int, typer.Option(help="Valid for so many days.", min=1, max=366)] = 30,
    lifetime: Annotated[
        str, typer.Option("--for", help="Valid for so long, as 90s, 15m, 2h, 7d, instead of --days.")
    ] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model the key is for, '*' for any text; repeatable. None: all that the client may."
        ),
    ] = None,
    tier: Annotated[
        str, typer.Option(help="Tier that the client is put into; its limits are those of all its keys.")
    ] = "",
    admin: Annotated[
        bool, typer.Option(help="The key may also administer the gateway and the registry.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Sign a new API key. It is printed once, to standard output, and stored nowhere."""
    ttl = duration(lifetime) if lifetime else Duration(seconds=days * 86_400)
    if ttl is None:
        fail(f'--for: "{lifetime}" is not like 90s, 15m, 2h or 7d')
    request = pb.CreateKeyRequest(client=client, ttl=ttl, admin=admin, models=model or (), tier=tier)
    answer = _call(context.obj, lambda stub: stub.CreateKey, request)
    if output == Format.json:
        as_json(answer)
        return
    of = f" for {', '.join(model)}" if model else ""
    err.print(
        f"[dim]key {answer.key_id} of {escape(client)}{escape(of)}, valid until {when(answer.expire_time)} "
        "UTC[/dim]"
    )
    typer.echo(answer.key)


@app.command("list")
def list_(
    context: typer.Context,
    client: Annotated[str, typer.Option(help="Only the keys of this client.")] = "",
    output: Output = Format.table,
) -> None:
    """The keys that have not expired, with who made them; revoked ones are marked."""
    answer = _call(context.obj, lambda stub: stub.ListKeys, pb.ListKeysRequest(client=client))
    if output == Format.json:
        as_json(answer.keys)
        return
    rows = [
        (
            key.key_id,
            key.client,
            ", ".join(key.models) or "all it may",
            "admin" if key.admin else "",
            when(key.create_time),
            when(key.expire_time),
            key.created_by,
            f"revoked {when(key.revoke_time)}" if key.HasField("revoke_time") else "",
        )
        for key in answer.keys
    ]
    columns = ("KEY", "CLIENT", "MODELS", "SCOPE", "MADE (UTC)", "EXPIRES (UTC)", "BY", "")
    table(columns, rows, "no keys; `lingqu keys create` makes one")
    if answer.stale:
        err.print("[yellow]etcd is out of reach: this is the last known state[/yellow]")


@app.command()
def revoke(
    context: typer.Context,
    key_id: KeyId,
    client: Annotated[
        str, typer.Option(help="Whose key it is, for one that `keys list` does not know.")
    ] = "",
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    output: Output = Format.table,
) -> None:
    """Take a key back for good: within a second nobody takes it any more. Calls in progress go on."""
    request = pb.RevokeKeyRequest(key_id=key_id, reason=reason, client=client)
    key = _call(context.obj, lambda stub: stub.RevokeKey, request).key
    if output == Format.json:
        as_json(key)
    else:
        of = f" of {key.client}" if key.client else " (of which nothing else is known)"
        out.print(f"key {escape(key.key_id)}{escape(of)}: revoked")


@app.command()
def revoked(context: typer.Context, output: Output = Format.table) -> None:
    """The keys that were taken back, with when and why."""
    request = access_pb2.ListRevokedKeysRequest()
    answer = clients.call(context.obj, lambda stub: stub.ListRevokedKeys, request)
    if output == Format.json:
        as_json(answer.keys)
        return
    rows = [(k.key_id, k.client, when(k.revoke_time), k.reason) for k in answer.keys]
    table(("KEY", "CLIENT", "REVOKED (UTC)", "REASON"), rows, "no key was revoked")
    if answer.stale:
        err.print("[yellow]etcd is out of reach: this is the last known state[/yellow]")


@app.command()
def rotate(
    context: typer.Context,
    retire: Annotated[
        str, typer.Option(help="Instead: forget this former signing key; what it has signed stops working.")
    ] = "",
    leaked: Annotated[
        bool,
        typer.Option("--leaked", help="The signing keys have leaked: every key made so far is void at once."),
    ] = False,
    output: Output = Format.table,
) -> None:
    """Sign new keys with the next signing key; keys that were made go on to work until they expire.

    With --leaked the answer holds a new admin key for you, printed to standard output, valid for an hour."""
    if retire and leaked:
        fail("--retire and --leaked do not go together")
    if retire:
        retiring = pb.RetireSigningKeyRequest(key_id=retire)
        answer = _call(context.obj, lambda stub: stub.RetireSigningKey, retiring)
    else:
        rotating = pb.RotateSigningKeyRequest(retire_all=leaked)
        answer = _call(context.obj, lambda stub: stub.RotateSigningKey, rotating)
    if output == Format.json:
        as_json(answer)
        return
    _print_signing(answer.signing_keys)
    if leaked:
        err.print("[yellow]every key made before is void; this one is yours for an hour:[/yellow]")
        typer.echo(answer.key)


@app.command()
def signing(context: typer.Context, output: Output = Format.table) -> None:
    """The keys that sign, will sign and have signed."""
    request = pb.ListSigningKeysRequest()
    answer = _call(context.obj, lambda stub: stub.ListSigningKeys, request)
    if output == Format.json:
        as_json(answer.signing_keys)
    else:
        _print_signing(answer.signing_keys)


def _print_signing(keys: Any) -> None:
    rows = [(key.key_id, STATES.get(key.state, ""), when(key.expire_time)) for key in keys]
    table(("SIGNING KEY", "STATE", "UNTIL (UTC)"), rows, "no signing keys")


def _call(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    """One call of GatewayService, with the suite's key."""

    async def work() -> Any:
        async with suite.channel(GATEWAY_PORT) as channel:
            return await method(GatewayServiceStub(channel))(request, timeout=10, metadata=suite.metadata)

    return run(work())
