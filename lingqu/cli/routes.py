"""`lingqu routes`, `lingqu routes explain` and `lingqu drain`: what goes where, why, and not for now."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from rich.markup import escape

from lingqu.cli.connection import GATEWAY_PORT, REGISTRY_PORT, Suite, err, fail, out, run
from lingqu.cli.output import Format, Output, as_json, table
from lingqu.gateway.v1 import gateway_pb2 as pb
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import instances_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub

app = typer.Typer(help="What goes where, and why.", invoke_without_command=True)
ENVOY_ADMIN_PORT = 9901


@app.callback()
def routes(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Only this model's.")] = "",
    output: Output = Format.table,
) -> None:
    """Shares of versions, where they are, and how the replicas are."""
    if context.invoked_subcommand is not None:
        return
    answer = _ask(context.obj, lambda stub: stub.DescribeRoutes, pb.DescribeRoutesRequest(model=model))
    if output == Format.json:
        as_json(answer)
        return
    columns = ("MODEL", "VERSION", "SHARE", "ASKED FOR AS", "BREAKER", "TEXT", "TENSOR", "REST")
    table(columns, map(_row, (*answer.routes, *answer.named_routes)), "nothing is routed")
    for plane in answer.data_planes:
        state = "up to date" if plane.synced_version == answer.version else "being told"
        out.print(f"[dim]{escape(plane.node_id)}: {state}[/dim]")
        if plane.last_rejection:
            err.print(f"[red]{escape(plane.node_id)} refuses: {escape(plane.last_rejection)}[/red]")
    for what, why in sorted(answer.refused.items()):
        err.print(f"[red]held back: {escape(what)}: {escape(why)}[/red]")
    if not answer.registry_connected:
        err.print("[yellow]the registry is out of reach: these are the last routes known[/yellow]")


@app.command()
def explain(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="As the request names it: m, m@3, m@canary.")],
    client: Annotated[str, typer.Option(help="Who makes it.")] = "",
    header: Annotated[
        list[str] | None, typer.Option("--header", help="NAME=VALUE, such as lingqu-version=3; repeatable.")
    ] = None,
    kind: Annotated[str, typer.Option(help="text, tensor or rest.")] = "text",
    version: Annotated[str, typer.Option(help="model_version of a tensor request.")] = "",
    output: Output = Format.table,
) -> None:
    """Why a request goes where it goes."""
    headers = dict(_pair(text) for text in header or ())
    request = pb.ExplainRouteRequest(
        client=client, model=model, kind=kind, headers=headers, model_version=version
    )
    found = _ask(context.obj, lambda stub: stub.ExplainRoute, request)
    if output == Format.json:
        as_json(found)
        return
    for title, text in _explained(found):
        out.print(f"  [bold]{title:<10}[/bold] {escape(text)}")


def drain(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(help="Id of a replica (`lingqu instances`), or 'gateway' for this machine's Envoy."),
    ],
    undo: Annotated[bool, typer.Option("--undo", help="Let it take requests again.")] = False,
) -> None:
    """Give a replica, or this machine's gateway, no new requests; those in progress go on."""
    suite: Suite = context.obj
    if what == "gateway":
        _drain_gateway(suite, undo)
        told = (
            "takes clients again" if undo else "asks its clients to go elsewhere and fails its health check"
        )
        out.print(f"the gateway {told}")
        return
    request = instances_pb2.DrainInstanceRequest(id=what, undo=undo)

    async def work() -> Any:
        async with suite.channel(REGISTRY_PORT) as channel:
            stub: Any = RegistryServiceStub(channel)
            return await stub.DrainInstance(request, metadata=suite.metadata, timeout=10)

    run(work())
    out.print(f"{escape(what)}: {'takes requests again' if undo else 'gets no new requests'}")


def _drain_gateway(suite: Suite, undo: bool) -> None:
    if suite.address is not None:
        fail("--address reaches the public port only; run this command on the gateway's own machine")
    url = f"http://{suite.local(ENVOY_ADMIN_PORT)}/healthcheck/{'ok' if undo else 'fail'}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(urllib.request.Request(url, method="POST"), timeout=5).close()
    except (OSError, urllib.error.URLError) as error:
        fail(f"Envoy does not answer on {suite.local(ENVOY_ADMIN_PORT)}: {error}")


def _ask(suite: Suite, method: Callable[[Any], Any], request: Any) -> Any:
    async def work() -> Any:
        async with suite.channel(GATEWAY_PORT) as channel:
            return await method(GatewayServiceStub(channel))(request, metadata=suite.metadata, timeout=10)

    return run(work())


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        fail(f'"{text}" is not NAME=VALUE')
    return name.lower(), value


def _row(route: Any) -> tuple[object, ...]:
    share = f"{route.share:.4g} %" if route.percent else ""
    if route.percent and abs(route.share - route.percent) > 0.01:
        share += f" ({route.percent} %)"
    if route.shadow_percent:
        share = f"copies of {route.shadow_percent} %"
    breaker = pb.Breaker.State.Name(route.breaker.state).removeprefix("STATE_").lower().replace("_", " ")
    kinds = [_places(e for e in route.endpoints if e.kind == kind) for kind in ("text", "tensor", "rest")]
    return route.model, route.version, share, ", ".join(route.names), breaker, *kinds


def _places(endpoints: Iterable[Any]) -> str:
    """Where it is; what is wrong there in words."""
    found = []
    for endpoint in endpoints:
        states = [
            text
            for text, wrong in (
                ("draining", endpoint.draining),
                ("does not answer", not endpoint.healthy),
                ("ejected", bool(endpoint.ejected_by)),
                (f"{endpoint.in_progress} in progress", bool(endpoint.in_progress)),
            )
            if wrong
        ]
        found.append(endpoint.address + (f" ({', '.join(states)})" if states else ""))
    return ", ".join(found)


def _explained(found: Any) -> list[tuple[str, str]]:
    rows = [("rule", found.rule)]
    rows += [
        (f"{100 * c.probability:.4g} %", f"{c.cluster}: {', '.join(c.endpoints) or 'no replica'}")
        for c in found.choices
    ]
    if found.HasField("copy"):
        rows.append(("copy", f"{100 * found.copy.probability:.4g} % to {found.copy.cluster}"))
    if found.refusal_reason:
        rows.append(("refused", f"{found.refusal_reason}: {found.refusal_message}"))
    rows += [("replica", found.balancing)] if found.balancing else []
    rows += [("limit", text) for text in found.limits]
    return [*rows, ("filters", " > ".join(found.filters))]
