"""Routes and explanations as messages of `lingqu.gateway.v1`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from lingqu.gateway.v1 import gateway_pb2 as pb
from services.core.discovery import READY, Replica, VersionKey
from services.core.errors import InvalidInput
from services.gateway import breakers
from services.gateway.admin import Condition, Conditions
from services.gateway.breakers import Breaker, Phase
from services.gateway.clusters import backends
from services.gateway.explain import REST, TENSOR, TEXT, Choice, Explanation, Question
from services.gateway.view import ZONE, Target, View

PROTOCOLS = {"text": "grpc", "tensor": "oip", "rest": "http"}


def to_routes(
    view: View, breaker: Callable[[str, int], Breaker], seen: Mapping[str, Conditions], model: str = ""
) -> tuple[list[pb.ModelRoute], list[pb.ModelRoute]]:
    """Those with a share and the others. `seen` is what data planes say, by node id."""
    at = {address: replica for replica in view.replicas for address in replica.endpoints.values()}
    draining: dict[VersionKey, list[Replica]] = {}
    for replica in view.replicas:
        for hosted in replica.models if replica.draining else ():
            if hosted.state == READY:
                draining.setdefault(hosted.key, []).append(replica)
    models = {m.name: m for m in view.models}
    shares = _shares(view)

    def route(target: Target) -> pb.ModelRoute:
        known = models.get(target.model)
        names = [] if known is None else [n for n, v in known.aliases.items() if v == target.version]
        shadows = known is not None and known.shadow == target.version
        out = draining.get(VersionKey(target.model, target.version), [])
        return pb.ModelRoute(
            model=target.model,
            version=target.version,
            percent=target.percent,
            text_endpoints=target.text_endpoints,
            tensor_endpoints=target.tensor_endpoints,
            breaker=_breaker(breaker(target.model, target.version)),
            share=shares.get((target.model, target.version), 0.0),
            names=sorted(names),
            shadow_percent=known.shadow_percent if shadows and known is not None else 0,
            affinity=target.affinity,
            endpoints=[*_endpoints(target, view, at, seen), *_drained(target, out)],
        )

    def routes(targets: Iterable[Target]) -> list[pb.ModelRoute]:
        return [route(target) for target in targets if model in ("", target.model)]

    return routes(view.targets), routes(view.named)


def _shares(view: View) -> dict[tuple[str, int], float]:
    """In 100, as splits.py makes them."""
    by_model: dict[str, list[Target]] = {}
    for target in view.targets:
        by_model.setdefault(target.model, []).append(target)
    found: dict[tuple[str, int], float] = {}
    for name, targets in by_model.items():
        got, refused = breakers.shares((target.percent, target.admits) for target in targets)
        total = sum(got) + refused
        found |= {(name, t.version): 100 * g / total for t, g in zip(targets, got, strict=True) if total}
    return found


def _endpoints(
    target: Target, view: View, at: Mapping[str, Replica], seen: Mapping[str, Conditions]
) -> Iterable[pb.Endpoint]:
    for cluster, addresses in backends(target).items():
        for address in addresses:
            replica = at.get(address)
            told: dict[str, Condition] = {
                node: found[cluster][address]
                for node, found in seen.items()
                if address in found.get(cluster, {})
            }
            yield pb.Endpoint(
                replica=replica.id if replica else "",
                kind=cluster.partition("/")[0],
                address=address,
                zone=view.zones.get(address, ""),
                healthy=address not in view.unhealthy,
                ejected_by=sorted(node for node, condition in told.items() if condition.ejected),
                in_progress=sum(condition.in_progress for condition in told.values()),
            )


def _drained(target: Target, replicas: Iterable[Replica]) -> Iterable[pb.Endpoint]:
    kinds = [kind for kind in PROTOCOLS if kind == "tensor" or target.task != "tensor"]
    for replica in replicas:
        for kind in kinds:
            if address := replica.endpoints.get(PROTOCOLS[kind]):
                zone = replica.labels.get(ZONE, "")
                yield pb.Endpoint(
                    replica=replica.id, kind=kind, address=address, zone=zone, healthy=True, draining=True
                )


def _breaker(of: Breaker) -> pb.Breaker:
    states = {
        Phase.CLOSED: pb.Breaker.STATE_CLOSED,
        Phase.OPEN: pb.Breaker.STATE_OPEN,
        Phase.HALF_OPEN: pb.Breaker.STATE_HALF_OPEN,
    }
    return pb.Breaker(state=states[of.phase], reason=of.reason)


def to_question(request: pb.ExplainRouteRequest) -> Question:
    """Raises InvalidInput."""
    if not request.model:
        raise InvalidInput("model", "is required")
    kind = request.kind or TEXT
    if kind not in (TEXT, TENSOR, REST):
        raise InvalidInput("kind", "text, tensor or rest is needed")
    return Question(request.client, request.model, dict(request.headers), kind, request.model_version)


def to_explanation(found: Explanation, filters: Iterable[str]) -> pb.ExplainRouteResponse:
    refusal = found.refusal
    return pb.ExplainRouteResponse(
        rule=found.rule,
        choices=map(_choice, found.choices),
        refusal_reason=refusal.reason if refusal else "",
        refusal_message=str(refusal) if refusal else "",
        copy=_choice(found.copies) if found.copies else None,
        balancing=found.balancing,
        limits=found.limits,
        filters=[name.rpartition(".")[2] for name in filters],
    )


def _choice(choice: Choice) -> pb.RouteChoice:
    return pb.RouteChoice(
        version=choice.version,
        cluster=choice.cluster,
        probability=choice.probability,
        endpoints=choice.endpoints,
    )
