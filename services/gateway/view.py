"""What the gateway knows of the suite, reduced to what routing needs: a pure function of the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.core.access import Access
from services.core.discovery import READY, Model, Replica


@dataclass(frozen=True, slots=True)
class Target:
    """Where a share of a model's requests goes. `pinned`: another version of it may be loaded in the same
    Tritons and has the higher number, which Triton would take for a request that names no version."""

    model: str
    version: int
    task: str
    text_endpoints: tuple[str, ...]
    tensor_endpoints: tuple[str, ...]
    pinned: bool
    percent: int = 100
    rest_endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """All targets, ordered by model and version, every Triton there is, every replica's REST API, all models
    by name, and who may call them."""

    targets: tuple[Target, ...]
    tritons: tuple[str, ...]
    rest: tuple[str, ...] = ()
    models: tuple[Model, ...] = ()
    access: Access = field(default_factory=Access)


def view(replicas: Iterable[Replica], models: Iterable[Model], access: Access | None = None) -> View:
    """A model without traffic has no target; one whose replicas are all away has some without endpoints."""
    alive = sorted(replicas, key=lambda r: r.id)
    targets: list[Target] = []
    known_models = tuple(sorted(models, key=lambda m: m.name))
    for model in known_models:
        found = [_target(model, version, percent, alive) for version, percent in sorted(model.weights)]
        known = [target for target in found if target is not None]
        # A version whose replicas are all away leaves its share to the others.
        targets += [t for t in known if t.text_endpoints or t.tensor_endpoints] or known
    oip, http = _endpoints(alive, "oip"), _endpoints(alive, "http")
    return View(tuple(targets), oip, http, known_models, access or Access())


def _endpoints(replicas: Iterable[Replica], protocol: str) -> tuple[str, ...]:
    return tuple(r.endpoints[protocol] for r in replicas if protocol in r.endpoints)


def _target(model: Model, number: int, percent: int, alive: list[Replica]) -> Target | None:
    version = next((v for v in model.versions if v.key.version == number), None)
    if version is None:
        return None
    ready = [r for r in alive if any(h.key == version.key and h.state == READY for h in r.models)]
    return Target(
        model.name,
        number,
        version.task,
        _endpoints(ready, "grpc"),
        _endpoints(ready, "oip"),
        any(v.key.version > number for v in model.versions),
        percent,
        _endpoints(ready, "http"),
    )
