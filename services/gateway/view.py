"""What the gateway knows of the suite, reduced to what routing needs: a pure function of the registry."""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from services.core.access import Access
from services.core.discovery import READY, Model, Replica, Version, VersionKey

ZONE = "zone"
AFFINITY = "lingqu.affinity"
# What is let into a header as a model's name: no request can name another.
_MODEL_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """A version that requests may go to. `percent` is its share of those that ask for no version. `pinned`:
    another version of it may be loaded in the same Tritons and has the higher number, which Triton would take
    for a request that names no version. `affinity`: what keeps requests on one replica, "prefix", "session"
    or "none". `admits`: how many of 100 requests its breaker lets through. `max_requests`: how many a gateway
    may have in progress, 0 for the default. `share_key`: the runtime key of its share,
    if it has one (shares.py)."""

    model: str
    version: int
    task: str
    text_endpoints: tuple[str, ...]
    tensor_endpoints: tuple[str, ...]
    pinned: bool
    percent: int = 100
    rest_endpoints: tuple[str, ...] = ()
    affinity: str = "none"
    admits: int = 100
    max_requests: int = 0
    share_key: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """All targets with traffic, ordered by model and version, every Triton there is, every replica's REST
    API, all models by name, and who may call them.

    `named` are the targets without traffic that requests may ask for; `zones` has the zone of an endpoint
    that has one, `unhealthy` those that do not answer. `gateways` are the control planes, `limiters` those
    that can be asked for limits. `texts` are the text APIs; `replicas` are all, also those that drain."""

    targets: tuple[Target, ...]
    tritons: tuple[str, ...]
    rest: tuple[str, ...] = ()
    models: tuple[Model, ...] = ()
    access: Access = field(default_factory=Access)
    named: tuple[Target, ...] = ()
    zones: Mapping[str, str] = field(default_factory=dict)
    unhealthy: frozenset[str] = frozenset()
    gateways: tuple[str, ...] = ()
    limiters: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    replicas: tuple[Replica, ...] = ()


def view(
    replicas: Iterable[Replica],
    models: Iterable[Model],
    access: Access | None = None,
    unhealthy: Iterable[str] = (),
    gateways: Iterable[Replica] = (),
    limiters: Iterable[str] = (),
) -> View:
    """A model without traffic has no target; one whose replicas are all away has some without endpoints.

    Names and addresses that Envoy would refuse are as good as none. `unhealthy` are endpoints that do not
    answer; a Triton takes its whole replica with it."""
    known_replicas = tuple(sorted(replicas, key=lambda r: r.id))
    alive = [r for r in known_replicas if not r.draining]
    ready: dict[VersionKey, list[Replica]] = defaultdict(list)
    for replica in alive:
        for hosted in replica.models:
            if hosted.state == READY and replica not in ready[hosted.key][-1:]:
                ready[hosted.key].append(replica)
    targets: list[Target] = []
    named: list[Target] = []
    known_models = tuple(sorted((m for m in models if _MODEL_NAME.fullmatch(m.name)), key=lambda m: m.name))
    for model in known_models:
        if not model.weights:
            continue
        shares = dict(model.weights)
        wanted = {*shares, *model.aliases.values(), model.shadow}
        found = [
            _target(model, version, shares.get(version.key.version, 0), ready.get(version.key, []))
            for version in model.versions
            if version.key.version in wanted or (not version.offline and version.key in ready)
        ]
        # A version whose replicas are all away leaves its share to the others; who asks for it gets no other.
        weighted = [t for t in found if t.percent]
        able = [t for t in weighted if t.text_endpoints or t.tensor_endpoints] or weighted
        targets += able
        named += [replace(t, percent=0) for t in found if t not in able]
    return View(
        tuple(targets),
        _endpoints(alive, "oip"),
        _endpoints(alive, "http"),
        known_models,
        access or Access(),
        tuple(named),
        {address: r.labels[ZONE] for r in alive if r.labels.get(ZONE) for address in r.endpoints.values()},
        _with_company(alive, frozenset(unhealthy)),
        _endpoints(sorted(gateways, key=lambda g: g.id), "grpc"),
        tuple(limiters),
        _endpoints(alive, "grpc"),
        known_replicas,
    )


def _with_company(replicas: Iterable[Replica], unhealthy: frozenset[str]) -> frozenset[str]:
    """REST is served by the process of the text API, and nothing is served without Triton."""
    found: set[str] = set()
    for replica in replicas if unhealthy else ():
        at = replica.endpoints
        if at.get("oip") in unhealthy:
            found.update(at.values())
        elif at.get("grpc") in unhealthy:
            found.update(address for kind, address in at.items() if kind in ("grpc", "http"))
    return frozenset(found)


def _endpoints(replicas: Iterable[Replica], protocol: str) -> tuple[str, ...]:
    """Each once: two replicas at one address are one place to go."""
    found = (r.endpoints[protocol] for r in replicas if protocol in r.endpoints)
    return tuple(dict.fromkeys(address for address in found if is_address(address)))


@lru_cache(maxsize=65_536)
def is_address(text: str) -> bool:
    """Whether `text` is "IP:port", as Envoy's endpoints are."""
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return not address.is_unspecified and port.isascii() and port.isdigit() and 0 < int(port) < 65536


def _target(model: Model, version: Version, percent: int, ready: list[Replica]) -> Target:
    number = version.key.version
    affinity = version.labels.get(AFFINITY, "prefix" if version.task == "generate" else "none")
    return Target(
        model.name,
        number,
        version.task,
        _endpoints(ready, "grpc"),
        _endpoints(ready, "oip"),
        any(v.key.version > number for v in model.versions),
        percent,
        _endpoints(ready, "http"),
        affinity if affinity in ("prefix", "session") else "none",
        max_requests=model.protection.max_requests,
    )
