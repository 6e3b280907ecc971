"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from services.core.discovery import Model
from services.core.errors import ModelNotFound
from services.inference.rest.answers import Answer, whole
from services.inference.rest.endpoint import Asked
from services.inference.routing import Routing

TASKS_WITHOUT_REST = ("tensor",)


class Listing:
    """All models that take requests here."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing

    async def __call__(self, asked: Asked) -> Answer:
        return whole({"object": "list", "data": [_item(model) for model in _listed(self._routing)]})


class Single:
    """One of them."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing

    async def __call__(self, asked: Asked) -> Answer:
        name = asked.path["id"]
        found = next((model for model in _listed(self._routing) if model.name == name), None)
        if found is None:
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
