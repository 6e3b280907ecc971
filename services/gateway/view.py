"""What the gateway knows of the suite, reduced to what routing needs: a pure function of the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.core.discovery import READY, Model, Replica


@dataclass(frozen=True, slots=True)
class Target:
    """Where one model's requests go. `pinned`: another version of it may be loaded in the same Tritons and
    has the higher number, which Triton would take for a request that names no version."""

    model: str
    version: int
    task: str
    text_endpoints: tuple[str, ...]
    tensor_endpoints: tuple[str, ...]
    pinned: bool


@dataclass(frozen=True, slots=True)
class View:
    """All targets, ordered by model, and every Triton there is."""

    targets: tuple[Target, ...]
    tritons: tuple[str, ...]


def view(replicas: Iterable[Replica], models: Iterable[Model]) -> View:
    """A model without traffic has no target; one whose replicas are all away has one without endpoints."""
    alive = sorted(replicas, key=lambda r: r.id)
    targets = []
    for model in sorted(models, key=lambda m: m.name):
        version = next((v for v in model.versions if v.key.version == model.traffic), None)
        if version is None:
            continue
        ready = [r for r in alive if any(h.key == version.key and h.state == READY for h in r.models)]
        targets.append(
            Target(
                model.name,
                model.traffic,
                version.task,
                tuple(r.endpoints["grpc"] for r in ready if "grpc" in r.endpoints),
                tuple(r.endpoints["oip"] for r in ready if "oip" in r.endpoints),
                any(v.key.version > model.traffic for v in model.versions),
            )
        )
    tritons = tuple(r.endpoints["oip"] for r in alive if "oip" in r.endpoints)
    return View(tuple(targets), tritons)
