"""Which versions a replica should have loaded: a pure rule, which every replica applies by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from services.core.discovery import FAILED, READY, Model, Replica, Version


def desired(models: Iterable[Model], me: Replica, others: Iterable[Replica]) -> list[Version]:
    """What `me` should have: versions that somebody may ask for, of models that are placed here; those with
    traffic first, because somebody waits for them. `others` may contain `me`."""
    alive = {replica.id: replica for replica in others} | {me.id: me}
    wanted: list[tuple[int, Version]] = []
    for model in models:
        ranks = _needed(model)
        for version in model.versions:
            if version.key.version in ranks and not version.offline and _is_here(model, version, me, alive):
                wanted.append((ranks.index(version.key.version), version))
    return [version for _, version in sorted(wanted, key=lambda w: (w[0], w[1].key))]


def _needed(model: Model) -> list[int]:
    """With traffic, in the shadow, the candidate (the newest), the way back, named, and those to be kept."""
    newest = max((v.key.version for v in model.versions if not v.offline), default=0)
    weighted = [model.traffic, *(version for version, _ in model.weights)]
    return [*weighted, model.shadow, newest, *model.previous, *model.aliases.values(), *model.placement.keep]


def _is_here(model: Model, version: Version, me: Replica, alive: dict[str, Replica]) -> bool:
    """Of the replicas that fit, those with the highest hash of (model, replica) hold a version: rendezvous
    hashing (Thaler and Ravishankar, 1998), so that a replica that comes or goes moves as little as possible.
    One that refuses the version for good keeps saying so, and others take its place. One that is chosen no
    more keeps a version that serves until all that are chosen have it ready."""
    fitting = [r for r in alive.values() if _fits(r, model)]
    able = [r for r in fitting if not _refuses(r, version)]
    ranked = sorted(able, key=lambda r: _weight(model.name, r.id), reverse=True)
    chosen = ranked[: model.placement.replicas or None]
    if any(replica.id == me.id for replica in chosen) or (_fits(me, model) and _refuses(me, version)):
        return True
    serves = version.key.version in [model.shadow, *(number for number, _ in model.weights)]
    taken_over = bool(chosen) and all(_has_ready(replica, version) for replica in chosen)
    return serves and _has_ready(me, version) and not taken_over


def _fits(replica: Replica, model: Model) -> bool:
    return all(replica.labels.get(key) == value for key, value in model.placement.labels.items())


def _has_ready(replica: Replica, version: Version) -> bool:
    return any(held.key == version.key and held.state == READY for held in replica.models)


def _refuses(replica: Replica, version: Version) -> bool:
    return any(h.key == version.key and h.state == FAILED and not h.will_retry for h in replica.models)


def _weight(model: str, replica: str) -> bytes:
    return hashlib.sha256(f"{model}\n{replica}".encode()).digest()
