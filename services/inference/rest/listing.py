"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from services.core.discovery import Model
from services.core.errors import ModelNotFound
from services.inference.rest.answers import Answer, whole
from services.inference.rest.endpoint import Asked
from services.inference.rest.permits import Permits
from services.inference.routing import Routing

TASKS_WITHOUT_REST = ("tensor",)


class Listing:
    """All models that take requests here and that the caller may call."""

    def __init__(self, routing: Routing, permits: Permits) -> None:
        self._routing = routing
        self._permits = permits

    async def __call__(self, asked: Asked) -> Answer:
        shown = self._permits(asked.headers)
        found = [_item(model) for model in _listed(self._routing) if shown(model.name)]
        return whole({"object": "list", "data": found})


class Single:
    """One of them."""

    def __init__(self, routing: Routing, permits: Permits) -> None:
        self._routing = routing
        self._permits = permits

    async def __call__(self, asked: Asked) -> Answer:
        name = asked.path["id"]
        found = next((model for model in _listed(self._routing) if model.name == name), None)
        if found is None or not self._permits(asked.headers)(name):
            raise ModelNotFound(name[:64])
        return whole(_item(found))


def _listed(routing: Routing) -> list[Model]:
    """Ordered by name. Raises BackendUnavailable."""
    found = [
        model
        for model in routing.known().values()
        if any(v.key.version == model.traffic and v.task not in TASKS_WITHOUT_REST for v in model.versions)
    ]
    return sorted(found, key=lambda model: model.name)


def _item(model: Model) -> dict[str, Any]:
    version = next(v for v in model.versions if v.key.version == model.traffic)
    return {"id": model.name, "object": "model", "created": version.created, "owned_by": "lingqu"}
