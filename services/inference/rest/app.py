"""The REST API as one ASGI application: which path is answered by whom."""

from __future__ import annotations

from http import HTTPStatus

from opentelemetry import trace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.core.errors import LingquError, NotFound
from services.core.rest import MethodNotAllowed, to_http
from services.inference.rest.answers import Answer, Whole
from services.inference.rest.chat import Chat
from services.inference.rest.completions import Completions
from services.inference.rest.document import document
from services.inference.rest.embeddings import Embeddings
from services.inference.rest.endpoint import KEEP_ALIVE_S, Asked, Endpoint, Handler
from services.inference.rest.layers import rest_stack
from services.inference.rest.listing import Listing, Single
from services.inference.rest.permits import Permits, everything
from services.inference.rest.serving import Models


def rest_app(
    models: Models,
    tracer: trace.Tracer,
    max_in_flight: int,
    keep_alive_s: float = KEEP_ALIVE_S,
    permits: Permits = everything,
) -> Starlette:
    def route(method: str, path: str, handler: Handler) -> Route:
        return Route(path, Endpoint(handler, keep_alive_s), methods=[method])

    return Starlette(
        routes=[
            route("POST", "/v1/chat/completions", Chat(models)),
            route("POST", "/v1/completions", Completions(models)),
            route("POST", "/v1/embeddings", Embeddings(models)),
            route("GET", "/v1/models", Listing(models.routing, permits)),
            route("GET", "/v1/models/{id}", Single(models.routing, permits)),
            route("GET", "/openapi.json", Document()),
        ],
        middleware=rest_stack(tracer, max_in_flight),
        exception_handlers={HTTPException: _refused},
    )


class Document:
    """GET /openapi.json."""

    def __init__(self) -> None:
        self._whole = Whole(document())

    async def __call__(self, asked: Asked) -> Answer:
        return self._whole


async def _refused(request: Request, refused: Exception) -> Response:
    """What no route takes."""
    error: LingquError = NotFound(f"there is no {request.url.path[:64]}")
    headers = refused.headers if isinstance(refused, HTTPException) else None
    if isinstance(refused, HTTPException) and refused.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        error = MethodNotAllowed(f"{request.method} is not for {request.url.path[:64]}")
    made = to_http(error)
    return JSONResponse(made.body, made.status, headers)
