"""Which versions a replica should have loaded: a pure rule."""

from __future__ import annotations

from collections.abc import Iterable

from services.core.discovery import Model, Version


def desired(models: Iterable[Model]) -> list[Version]:
    """For each model the version that takes the traffic, the one before it (the way back) and the newest
    (the candidate); those with traffic first, because somebody waits for them."""
    wanted: list[tuple[int, Version]] = []
    for model in models:
        newest = max((v.key.version for v in model.versions), default=0)
        for version in model.versions:
            ranks = [model.traffic, newest, model.previous]
            if version.key.version in ranks:
                wanted.append((ranks.index(version.key.version), version))
    return [version for _, version in sorted(wanted, key=lambda w: (w[0], w[1].key))]
