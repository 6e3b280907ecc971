"""`lingqu models traffic | promote | rollback | alias | history | policy | placement`: what models serve."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.duration_pb2 import Duration
from rich.markup import escape

from lingqu.cli.arguments import bounded
from lingqu.cli.connection import fail, out
from lingqu.cli.models import Name, Number, Reason, Timeout, call, publishing, read_model, released
from lingqu.cli.modelview import placement as placement_words
from lingqu.cli.modelview import policy as policy_words
from lingqu.cli.modelview import shares, tell
from lingqu.cli.output import Format, Output, as_json, table, when
from lingqu.publishing import Publisher
from lingqu.registry.v1 import models_pb2


def traffic(
    context: typer.Context,
    name: Name,
    weights: Annotated[
        list[str] | None, typer.Argument(help="VERSION=PERCENT …, adding up to 100. Without: look.")
    ] = None,
    shadow: Annotated[int, typer.Option(help="Version that gets a copy of the requests.")] = 0,
    shadow_percent: Annotated[
        int, typer.Option(help="How many of 100 requests it gets a copy of; 0: all.", min=0, max=100)
    ] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Take the model off line.")] = False,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    output: Output = Format.table,
) -> None:
    """Look at a model's traffic, or split it: `lingqu models traffic m 1=90 2=10`. Old versions are
    loaded first."""
    if not weights and not offline:
        tell(read_model(context.obj, name), output)
        return
    shares = [_weight(text) for text in weights or ()]
    request = models_pb2.SetTrafficRequest(
        model=name,
        weights=shares,
        shadow_version=shadow,
        shadow_percent=shadow_percent,
        offline=offline,
        reason=reason,
    )
    versions = [weight.version for weight in shares] + ([shadow] if shadow else [])
    tell(released(context.obj, lambda stub: stub.SetTraffic, request, versions, timeout).model, output)


def promote(
    context: typer.Context,
    name: Name,
    version: Number,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    output: Output = Format.table,
) -> None:
    """Give all traffic to a version. One that no replica holds is loaded and proven first."""

    async def work(publisher: Publisher) -> models_pb2.Model:
        return await publisher.released(
            name, [version], timeout, lambda: publisher.promote(name, version, reason)
        )

    tell(publishing(context.obj, work), output)


def rollback(
    context: typer.Context,
    name: Name,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    output: Output = Format.table,
) -> None:
    """Go back to the traffic before the last release; again, one further. Ends a running rollout."""
    model = read_model(context.obj, name)
    versions = [weight.version for weight in model.previous_traffic.weights]
    request = models_pb2.RollbackModelRequest(
        model=name, reason=reason, expected_revision=model.traffic_revision
    )
    tell(released(context.obj, lambda stub: stub.RollbackModel, request, versions, timeout).model, output)


def alias(
    context: typer.Context,
    name: Name,
    alias: Annotated[str, typer.Argument(help="The name, such as stable.")],
    version: Annotated[int, typer.Argument(help="Number of the version; 0 removes the name.", min=0)],
    reason: Reason = "",
    timeout: Timeout = 120.0,
    output: Output = Format.table,
) -> None:
    """Name a version, so that callers can pin to the name."""
    request = models_pb2.SetAliasRequest(model=name, alias=alias, version=version, reason=reason)
    tell(released(context.obj, lambda stub: stub.SetAlias, request, [version], timeout).model, output)


def history(
    context: typer.Context,
    name: Name,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)] = 20,
    output: Output = Format.table,
) -> None:
    """The releases of a model, newest first: what, who, when and why."""
    request = models_pb2.ListReleasesRequest(model=name, limit=limit)
    releases = call(context.obj, lambda stub: stub.ListReleases, request).releases
    if output == Format.json:
        as_json(releases)
        return
    kind = models_pb2.ReleaseKind.Name
    rows = [
        (
            r.number,
            when(r.time),
            kind(r.kind).removeprefix("RELEASE_KIND_").lower().replace("_", " "),
            shares(r.before),
            shares(r.after),
            r.actor,
            r.reason,
        )
        for r in releases
    ]
    table(("RELEASE", "TIME (UTC)", "BY", "FROM", "TO", "WHO", "WHY"), rows, "no releases yet")


def policy(
    context: typer.Context,
    name: Name,
    min_ready: Annotated[int | None, typer.Option(help="Replicas that must have a version ready.")] = None,
    interval: Annotated[int | None, typer.Option(help="Seconds between two releases.")] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation figure, as accuracy>=0.9 or perplexity<=12; repeatable; '' for none."),
    ] = None,
    releaser: Annotated[
        list[str] | None,
        typer.Option(help="Client that may release, '*' for any text; repeatable; '' for everybody."),
    ] = None,
    require_golden: Annotated[
        bool | None, typer.Option(help="Only versions with golden examples are released.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Requests of a version in progress in each gateway; 0: 8192.", min=0)
    ] = None,
    breaker: Annotated[bool | None, typer.Option(help="Whether versions have a breaker.")] = None,
    breaker_errors: Annotated[
        int | None, typer.Option(help="Percent of failures that opens it; 0: 50.", min=0, max=100)
    ] = None,
    breaker_requests: Annotated[
        int | None, typer.Option(help="Requests in ten seconds that it takes; 0: 20.", min=0)
    ] = None,
    breaker_latency: Annotated[
        float | None, typer.Option(help="Mean seconds that open it; 0: no bound.", min=0)
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(help="Model that answers while this one cannot; '' for none.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Look at what a model's releases have to satisfy and how gateways protect it, or change it; what is not
    named stays."""
    model = read_model(context.obj, name)
    changed = models_pb2.Policy()
    changed.CopyFrom(model.policy)
    if min_ready is not None:
        changed.min_ready_replicas = min_ready
    if interval is not None:
        changed.min_release_interval.CopyFrom(Duration(seconds=interval))
    if threshold is not None:
        del changed.thresholds[:]
        changed.thresholds.extend(_threshold(text) for text in threshold if text)
    if releaser is not None:
        changed.releasers[:] = [text for text in releaser if text]
    if require_golden is not None:
        changed.require_golden = require_golden
    given = {
        "max_requests": max_requests,
        "breaker_error_percent": breaker_errors,
        "breaker_min_requests": breaker_requests,
        "fallback_model": fallback,
        "breaker_off": None if breaker is None else not breaker,
    }
    for field, value in given.items():
        if value is not None:
            setattr(changed.protection, field, value)
    if breaker_latency is not None:
        changed.protection.ClearField("breaker_latency")
        if breaker_latency:
            changed.protection.breaker_latency.FromMilliseconds(round(breaker_latency * 1000))
    if changed != model.policy:
        request = models_pb2.SetPolicyRequest(model=name, policy=changed)
        model = call(context.obj, lambda stub: stub.SetPolicy, request).model
    if output == Format.json:
        as_json(model.policy)
    else:
        out.print(escape(policy_words(model.policy)) or "no policy: everybody may release, at any time")


def placement(
    context: typer.Context,
    name: Name,
    label: Annotated[
        list[str] | None, typer.Option(help="key=value that replicas must have; repeatable; '' for none.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="How many replicas; 0: all that fit.", min=0)] = None,
    keep: Annotated[
        list[int] | None, typer.Option(help="Version to keep loaded besides; repeatable; 0 for none.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Look at where a model is loaded, or change it; what is not named stays."""
    model = read_model(context.obj, name)
    changed = models_pb2.Placement()
    changed.CopyFrom(model.placement)
    if label is not None:
        changed.labels.clear()
        for text in filter(None, label):
            key, sign, value = text.partition("=")
            if not sign:
                fail(f'"{text}" is not key=value')
            changed.labels[key] = value
    if replicas is not None:
        changed.replicas = replicas
    if keep is not None:
        changed.keep[:] = [version for version in keep if version]
    if changed != model.placement:
        request = models_pb2.SetPlacementRequest(model=name, placement=changed)
        model = call(context.obj, lambda stub: stub.SetPlacement, request).model
    if output == Format.json:
        as_json(model.placement)
    else:
        out.print(escape(placement_words(model.placement)))


def _weight(text: str) -> models_pb2.Weight:
    version, sign, percent = text.removeprefix("v").partition("=")
    if not sign or not version.isdigit() or not percent.removesuffix("%").isdigit():
        fail(f'"{text}" is not VERSION=PERCENT, as in 1=90 2=10')
    return models_pb2.Weight(version=int(version), percent=int(percent.removesuffix("%")))


def _threshold(text: str) -> models_pb2.Threshold:
    if (found := bounded(text)) is None:
        fail(f'"{text}" is not like accuracy>=0.9 or perplexity<=12')
    metric, low, high = found
    return models_pb2.Threshold(metric=metric, min=low, max=high)
