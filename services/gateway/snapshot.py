"""From a view of the suite to everything Envoy has to know: one pure function.

Resources are written as the dictionaries that Envoy's documentation shows and parsed into its messages, so
that a misspelt field fails here and not in a data plane. Names of clusters carry model and version; a
cluster's configuration never changes, only its endpoints do.

What Envoy would refuse of one model costs that model its traffic, not the others their changes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.message import Message

from services.core.discovery import Model
from services.gateway import clusters, filters, xds
from services.gateway.filters import versions
from services.gateway.listener import Entry, listener
from services.gateway.progress import NOTHING, Progress
from services.gateway.resources import Parser, Refused, Resource
from services.gateway.routes import ROUTES, routes
from services.gateway.secrets import secrets, secured
from services.gateway.shares import LAYER, Shares
from services.gateway.splits import branch
from services.gateway.view import Target, View

MAX_BANNED = 1024
MAX_BRANCHES = 20_000  # of route trees that are remembered
Named = Mapping[str, Resource]
_Recipe = tuple[Any, ...]  # what makes a cluster's configuration, and its arguments
_Backend = tuple[Any, ...]  # all that a cluster and its endpoints are made of


@dataclass(frozen=True, slots=True)
class Known:
    """All that a view has of one model; `named` are the targets without traffic."""

    targets: tuple[Target, ...] = ()
    named: tuple[Target, ...] = ()
    models: tuple[Model, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Resources by type URL and name, each with a version that is the digest of its content. `refused`: what
    was left out or left as it was, and why. `at`: how much of the registry it knows."""

    found: Mapping[str, Named]
    version: str
    refused: Mapping[str, str] = field(default_factory=dict)
    at: Progress = NOTHING

    @property
    def resources(self) -> Mapping[str, Mapping[str, Message]]:
        return {kind: {name: r.message for name, r in named.items()} for kind, named in self.found.items()}

    @property
    def versions(self) -> Mapping[str, Mapping[str, str]]:
        return {kind: {name: r.version for name, r in named.items()} for kind, named in self.found.items()}


def snapshot(view: View, entry: Entry) -> Snapshot:
    """Everything for one state of the suite. The same arguments give the same snapshot. Raises Refused."""
    return Builder().build(view, entry)


class Builder:
    """The same for one state after another: each costs what has changed.

    A model with which no snapshot can be made, or that an Envoy has refused, stays as it was when it was last
    accepted until the registry says something else of it; so does a resource that belongs to no model. The
    first time, build raises Refused for the latter."""

    def __init__(self) -> None:
        self._parser = Parser()
        self._last: Snapshot | None = None
        self._known: dict[str, Known] = {}
        self._good: dict[str, Known] = {}
        self._bad: dict[str, tuple[Known, str]] = {}
        self._doubtful: list[str] = []
        self._banned: dict[str, str] = {}
        self._backed: dict[str, tuple[_Backend, tuple[Resource, Resource]]] = {}
        self._listened: tuple[Entry, dict[str, Any]] | None = None
        self._shares = Shares()
        self.tunes = True  # whether all Envoys take runtime values
        self._routed_last: tuple[Any, Resource] | None = None
        self._branched: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}

    def build(self, view: View, entry: Entry) -> Snapshot:
        known = _by_model(view)
        self._bad = {name: (was, why) for name, (was, why) in self._bad.items() if known.get(name) == was}
        try:
            made = self._made(self._usable(view), entry)
        except Refused:
            self._bad |= self._culprits(view, known, entry)
            try:
                made = self._made(self._usable(view), entry)
            except Refused:  # what they had before is no better
                for name in self._bad:
                    self._good.pop(name, None)
                made = self._made(self._usable(view), entry)
        refused = {f'model "{name}"': why for name, (_, why) in sorted(self._bad.items())}
        self._last, self._known = replace(made, refused={**made.refused, **refused}), known
        self._parser.turn()
        current = self._last.found[xds.ENDPOINTS]
        self._backed = {name: kept for name, kept in self._backed.items() if name in current}
        return self._last

    def refused(self, kind: str, version: str, why: str) -> bool:
        """An Envoy says no to a resource with this version. True: build again.

        Listeners and filters may be refused for what is wrong with one Envoy, such as a port that is taken:
        those it keeps by itself. All routes are one resource: whichever models have changed since it was last
        accepted are tried again one at a time."""
        if kind in ("Cluster", "ClusterLoadAssignment"):
            self._banned[version] = why
            while len(self._banned) > MAX_BANNED:
                del self._banned[next(iter(self._banned))]
            return True
        if kind != "RouteConfiguration" or not self._good or version not in self._routes():
            return False
        changed = [
            name for name, value in self._known.items()
            if value != self._good.get(name) and name not in self._bad
        ]  # fmt: skip
        self._bad |= {name: (self._known[name], why) for name in changed}
        self._doubtful += changed if len(changed) > 1 else []
        return bool(changed)

    def accepted(self, kind: str, version: str) -> bool:
        """An Envoy has taken a resource with this version. True: build again."""
        if kind != "RouteConfiguration" or version not in self._routes():
            return False
        held = {name: self._good[name] for name in self._bad.keys() & self._good.keys()}
        self._good = {name: value for name, value in self._known.items() if name not in self._bad} | held
        if self._doubtful:
            self._bad.pop(self._doubtful.pop(), None)
            return True
        return False

    def _routes(self) -> list[str]:
        return [r.version for r in self._last.found[xds.ROUTES].values()] if self._last else []

    def _usable(self, view: View) -> View:
        """The view with what is known to be good in place of what is known to be bad."""
        made = _without(view, self._bad)
        good = [self._good[name] for name in self._bad if name in self._good]
        if not good:
            return made
        return replace(
            made,
            targets=_ordered([*made.targets, *(t for known in good for t in known.targets)]),
            named=_ordered([*made.named, *(t for known in good for t in known.named)]),
            models=tuple(
                sorted((*made.models, *(m for known in good for m in known.models)), key=lambda m: m.name)
            ),
        )

    def _culprits(self, view: View, known: Mapping[str, Known], entry: Entry) -> dict[str, tuple[Known, str]]:
        """The models with which alone no snapshot can be made."""
        found = {}
        for name, value in known.items():
            try:
                self._made(_without(view, known.keys() - {name}), entry)
            except Refused as err:
                found[name] = (value, str(err))
        return found

    def _made(self, view: View, entry: Entry) -> Snapshot:
        made = []
        if entry.traces:
            made.append(clusters.fixed(clusters.TRACES, entry.traces))
        if entry.metrics:
            told = clusters.metrics(entry.metrics)
            made.append(secured(told) if entry.secrets.own else told)
        refused: dict[str, str] = {}

        def named(kind: str, bodies: Iterable[dict[str, Any]]) -> dict[str, Resource]:
            return {body["name"]: self._resource(kind, body["name"], body, refused) for body in bodies}

        backends = self._backends(view, entry, refused)
        found = {
            xds.CLUSTER: {**named(xds.CLUSTER, made), **{name: pair[0] for name, pair in backends.items()}},
            xds.ENDPOINTS: {name: pair[1] for name, pair in backends.items()},
            xds.SECRETS: named(xds.SECRETS, secrets(entry.secrets)),
            xds.LISTENER: named(xds.LISTENER, [self._listener(entry)]),
            xds.EXTENSIONS: named(xds.EXTENSIONS, filters.extensions(view, entry)),
            **self._routed(view, entry, refused),
        }
        return Snapshot(found, _digest(found), refused)

    def _backends(
        self, view: View, entry: Entry, refused: dict[str, str]
    ) -> dict[str, tuple[Resource, Resource]]:
        """Clusters by name, each with its endpoints. What is known of one is looked at, not made again."""
        found = {}
        for name, recipe, addresses in _clusters(view, entry):
            value: _Backend = (
                recipe,
                entry.secrets.own,
                addresses,
                tuple(view.zones.get(address) for address in addresses) if view.zones else (),
                view.unhealthy.intersection(addresses),
            )
            known = self._backed.get(name)
            if known is None or known[0] != value or any(r.version in self._banned for r in known[1]):
                before = len(refused)
                cluster = recipe[0](*recipe[1:])
                members = clusters.endpoints(name, addresses, view.zones, view.unhealthy)
                made = (
                    self._resource(xds.CLUSTER, name, secured(cluster) if value[1] else cluster, refused),
                    self._resource(xds.ENDPOINTS, name, members, refused),
                )
                known = (value, made)
                if len(refused) == before:  # what holds in place of something is to be told each time
                    self._backed[name] = known
                else:
                    self._backed.pop(name, None)
            found[name] = known[1]
        return found

    def _listener(self, entry: Entry) -> dict[str, Any]:
        if self._listened is None or self._listened[0] != entry:
            self._listened = (entry, listener(entry))
        return self._listened[1]

    def _routed(self, view: View, entry: Entry, refused: dict[str, str]) -> dict[str, dict[str, Resource]]:
        """The routes, and the runtime values for them. Routes do not change with addresses, nor a model's
        with those of others, nor with its weights alone."""
        targets, named, models = _placeless(view.targets), _placeless(view.named), view.models
        values: Mapping[str, Any] = {}
        if self.tunes:
            split = self._shares.split(targets, named, models)
            targets, named, models, values = split.targets, split.named, split.models, split.values
        else:
            self._shares.forget()
        key = (targets, named, models, entry.cors_origins)
        if self._routed_last is None or self._routed_last[0] != key:
            placeless = replace(view, targets=targets, named=named, models=models)
            body = routes(placeless, entry.cors_origins, self._branches)
            self._routed_last = (key, self._parser.resource(xds.MESSAGES[xds.ROUTES], body))
        layer = self._resource(xds.RUNTIME, LAYER, {"name": LAYER, "layer": dict(values)}, refused)
        return {xds.ROUTES: {ROUTES: self._routed_last[1]}, xds.RUNTIME: {LAYER: layer}}

    def _branches(
        self, service: str, known: Model | None, targets: Sequence[Target], spare: Sequence[Target]
    ) -> dict[str, Any]:
        place, value = (service, targets[0].model), (known, tuple(targets), tuple(spare))
        found = self._branched.get(place)
        if found is None or found[0] != value:
            while len(self._branched) >= MAX_BRANCHES:
                del self._branched[next(iter(self._branched))]
            found = self._branched[place] = (value, branch(service, known, targets, spare))
        return found[1]

    def _resource(self, kind: str, name: str, body: dict[str, Any], refused: dict[str, str]) -> Resource:
        try:
            made = self._parser.resource(xds.MESSAGES[kind], body)
            if why := self._banned.get(made.version):
                raise Refused(why)
        except Refused as err:
            of_models = kind == xds.ROUTES or "/" in name
            if of_models or self._last is None or name not in self._last.found[kind]:
                raise
            refused[f"{kind.rpartition('.')[2]} {name}"] = str(err)
            return self._last.found[kind][name]
        return made


def _clusters(view: View, entry: Entry) -> Iterator[tuple[str, _Recipe, tuple[str, ...]]]:
    """Those whose endpoints come from the registry, with their addresses."""
    yield clusters.CONTROL, (clusters.discovered, clusters.CONTROL), view.gateways or (entry.control,)
    yield clusters.LIMITER, (clusters.limiter,), view.limiters
    yield clusters.ANY_TRITON, (clusters.discovered, clusters.ANY_TRITON), view.tritons
    yield clusters.ANY_REST, (clusters.discovered, clusters.ANY_REST), view.rest
    shadows = {(model.name, model.shadow) for model in view.models if model.shadow and model.weights}
    for target in (*view.targets, *view.named):
        for name, addresses in clusters.backends(target).items():
            yield name, (clusters.discovered, name, target.affinity, target.max_requests), addresses
            if (target.model, target.version) in shadows:
                appending = versions.appending(target.version) if name.startswith("tensor/") else None
                yield f"{clusters.SHADOW}/{name}", (clusters.shadow, name, appending), addresses


def _by_model(view: View) -> dict[str, Known]:
    targets: defaultdict[str, list[Target]] = defaultdict(list)
    named: defaultdict[str, list[Target]] = defaultdict(list)
    for target in view.targets:
        targets[target.model].append(target)
    for target in view.named:
        named[target.model].append(target)
    models = {model.name: (model,) for model in view.models}
    return {
        name: Known(tuple(targets[name]), tuple(named[name]), models.get(name, ()))
        for name in {**targets, **named, **models}
    }


def _ordered(targets: Iterable[Target]) -> tuple[Target, ...]:
    return tuple(sorted(targets, key=lambda target: (target.model, target.version)))


def _placeless(targets: Iterable[Target]) -> tuple[Target, ...]:
    """With "anywhere" for whatever addresses there are."""

    def somewhere(addresses: tuple[str, ...]) -> tuple[str, ...]:
        return ("anywhere",) if addresses else ()

    return tuple(
        replace(
            target,
            text_endpoints=somewhere(target.text_endpoints),
            tensor_endpoints=somewhere(target.tensor_endpoints),
            rest_endpoints=somewhere(target.rest_endpoints),
        )
        for target in targets
    )


def _without(view: View, names: Iterable[str]) -> View:
    gone = frozenset(names)
    if not gone:
        return view
    return replace(
        view,
        targets=tuple(target for target in view.targets if target.model not in gone),
        named=tuple(target for target in view.named if target.model not in gone),
        models=tuple(model for model in view.models if model.name not in gone),
    )


def _digest(found: Mapping[str, Named]) -> str:
    lines = (
        f"{kind} {name} {named[name].version}\n" for kind, named in found.items() for name in sorted(named)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
