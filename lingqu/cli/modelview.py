"""How models look in tables and in words."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from lingqu.cli.connection import out
from lingqu.cli.output import Format, as_json, when
from lingqu.registry.v1 import instances_pb2, models_pb2

STATES = {
    instances_pb2.HOSTED_STATE_LOADING: "loading",
    instances_pb2.HOSTED_STATE_READY: "ready",
    instances_pb2.HOSTED_STATE_FAILED: "failed",
}

Hosting = dict[tuple[str, int], list[tuple[str, Any]]]
"""For each version, instances and what they say of it."""


def shares(traffic: models_pb2.Traffic) -> str:
    """ "v1 90 %, v2 10 %, shadow v3 (20 %)"."""
    parts = [f"v{w.version} {w.percent} %" for w in traffic.weights]
    if traffic.shadow_version:
        part = f" ({traffic.shadow_percent} %)" if traffic.shadow_percent else ""
        parts.append(f"shadow v{traffic.shadow_version}{part}")
    return ", ".join(parts) or "off line"


def models_table(models: list[models_pb2.Model], hosting: Hosting) -> Table:
    found = Table(box=None, header_style="bold")
    for column in ("MODEL", "VERSION", "STAGE", "TASK", "RUNTIME", "TRAFFIC", "REPLICAS"):
        found.add_column(column)
    for model in models:
        for version in model.versions:
            replicas = [f"{i} ({STATES[m.state]})" for i, m in hosting.get((model.name, version.version), [])]
            found.add_row(
                model.name,
                str(version.version),
                stage(version),
                version.task,
                version.runtime,
                share(model, version.version),
                ", ".join(replicas) or "–",
            )
    return found


def hosted(model: instances_pb2.HostedModel) -> str:
    """ "echo:2", "echo:2 (loading 43 %)"."""
    text = f"{model.model}:{model.version}"
    if model.state == instances_pb2.HOSTED_STATE_READY:
        return text
    share = f" {model.progress * 100:.0f} %" if model.progress else ""
    return f"{text} ({STATES.get(model.state, 'unknown')}{share})"


def stage(version: models_pb2.ModelVersion) -> str:
    return models_pb2.Stage.Name(version.stage).removeprefix("STAGE_").lower()


def tell(model: models_pb2.Model, output: Format) -> None:
    if output == Format.json:
        as_json(model)
    else:
        show_model(model)


def show_model(model: models_pb2.Model) -> None:
    out.print(f"[bold]{model.name}[/bold]  {shares(model.traffic)}")
    names = [f"{name} = v{number}" for name, number in sorted(model.traffic.aliases.items())]
    if names:
        out.print(f"  names     {', '.join(names)}")
    if model.previous_version:
        out.print(f"  way back  {shares(model.previous_traffic)}")
    if asked := policy(model.policy):
        out.print(f"  policy    {escape(asked)}")
    if model.placement.ByteSize():
        out.print(f"  placement {escape(placement(model.placement))}")
    if model.rollout.id:
        out.print(f"  rollout   of v{model.rollout.version}; `lingqu rollouts show {model.name}`")


def described(version: models_pb2.ModelVersion) -> list[tuple[str, str]]:
    detail = f": {version.stage_detail}" if version.stage_detail else ""
    needs, lineage = version.requirements, version.lineage
    figures = ", ".join(f"{name} {value:g}" for name, value in sorted(version.evaluation.items()))
    described = [
        ("stage", f"{stage(version)}{detail}"),
        ("task", f"{version.task} on {version.runtime} {needs.engine} {needs.fingerprint}".rstrip()),
        ("artifact", f"{version.artifact.uri} ({version.artifact.size_bytes / 1e6:.1f} MB)"),
        ("sha256", version.artifact.sha256),
        ("signed", f"by {version.artifact.signer}" if version.artifact.signer else "no"),
        ("created", f"{when(version.create_time)} UTC {version.creator and f'by {version.creator}'}".strip()),
        ("figures", figures),
        ("golden", f"{version.golden_examples} examples" if version.golden_examples else ""),
        ("inputs", _tensors(version.signature.inputs)),
        ("outputs", _tensors(version.signature.outputs)),
        ("from", ", ".join(filter(None, (lineage.parent, lineage.training_run, lineage.source)))),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(version.labels.items()))),
    ]
    return [(label, text) for label, text in described if text]


def _tensors(tensors: Any) -> str:
    return ", ".join(f"{t.name} {t.datatype}[{','.join(map(str, t.shape))}]" for t in tensors)


def share(model: models_pb2.Model, version: int) -> str:
    if percent := next((w.percent for w in model.traffic.weights if w.version == version), 0):
        return f"{percent} %"
    return "shadow" if version == model.traffic.shadow_version else "–"


def policy(of: models_pb2.Policy) -> str:
    parts = []
    if of.min_ready_replicas:
        parts.append(f"ready on {of.min_ready_replicas} replicas")
    if of.min_release_interval.seconds:
        parts.append(f"{of.min_release_interval.seconds} s between releases")
    for bound in of.thresholds:
        parts += [f"{bound.metric} ≥ {bound.min:g}"] if bound.HasField("min") else []
        parts += [f"{bound.metric} ≤ {bound.max:g}"] if bound.HasField("max") else []
    if of.require_golden:
        parts.append("golden examples")
    if of.releasers:
        parts.append("released by " + ", ".join(of.releasers))
    return "; ".join(parts + protection(of.protection))


def protection(of: models_pb2.Protection) -> list[str]:
    parts = [f"at most {of.max_requests:,} requests in progress"] if of.max_requests else []
    if of.fallback_model:
        parts.append(f"else {of.fallback_model}")
    if of.breaker_off:
        return [*parts, "no breaker"]
    opens = [f"{of.breaker_error_percent} % failures"] if of.breaker_error_percent else []
    if latency := of.breaker_latency.ToMilliseconds():
        opens.append(f"a mean of {latency:,} ms")
    if of.breaker_min_requests:
        opens.append(f"{of.breaker_min_requests} requests at least")
    return [*parts, f"breaker at {', '.join(opens)}"] if opens else parts


def placement(of: models_pb2.Placement) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in sorted(of.labels.items()))
    count = f"{of.replicas} of the replicas" if of.replicas else "all replicas"
    kept = ", ".join(f"v{version}" for version in of.keep)
    return count + (f" with {labels}" if labels else "") + (f"; kept: {kept}" if kept else "")
