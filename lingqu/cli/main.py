"""The `lingqu` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lingqu
from lingqu.cli import (
    alerts,
    capacity,
    clients,
    keys,
    limits,
    metrics,
    models,
    registry,
    releases,
    rollouts,
    routes,
    sizes,
    suite,
    tasks,
    text,
)
from lingqu.cli.connection import Suite

app = typer.Typer(
    name="lingqu",
    help="Serve language models with gRPC: run a suite on this machine, use it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lingqu {lingqu.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    state: Annotated[
        Path, typer.Option(help="State folder of the local suite.", envvar="LINGQU_STATE")
    ] = Path(".lingqu"),
    address: Annotated[
        str | None, typer.Option(help="Public port of another suite, host:port.", envvar="LINGQU_ADDRESS")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="API key. Default: LINGQU_KEY, or the local suite's dev.key.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the CA of the suite's certificate. Default: the local suite's, if it has one.",
            envvar="LINGQU_CA",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    context.obj = Suite(state, address, key, ca)


app.command()(suite.up)
app.command()(suite.status)
app.command()(text.generate)
app.command()(text.chat)
app.command()(text.embed)
app.command()(tasks.classify)
app.command()(tasks.answer)
app.command()(tasks.score)
app.command()(tasks.tokenize)
app.command()(suite.instances)
app.command()(capacity.capacity)
app.command()(routes.drain)
for command in (
    releases.traffic,
    releases.promote,
    releases.rollback,
    releases.alias,
    releases.history,
    releases.policy,
    releases.placement,
    sizes.size,
):
    models.app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(rollouts.app, name="rollouts")
app.add_typer(clients.app, name="clients")
app.add_typer(limits.app, name="limits")
app.add_typer(metrics.app, name="metrics")
app.add_typer(alerts.app, name="alerts")
app.add_typer(keys.app, name="keys")
app.add_typer(registry.app, name="registry")
app.add_typer(routes.app, name="routes")


def main() -> None:
    app()
