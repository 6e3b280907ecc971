"""Which global limits a request has to be within: a pure function of the registry's access records."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from services.core.access import Access, Limits
from services.core.patterns import matches

SHARDS = 32
# Pairs of client and model that are remembered.
REMEMBERED = 100_000


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What is counted, in a window of `length_ms`, to `step_ms`. `field` is its name in Limits."""

    field: str
    length_ms: int
    step_ms: int = 1
    tokens: bool = False


SECOND = Kind("requests_per_second", 1_000)
MINUTE = Kind("requests_per_minute", 60_000)
TOKEN_MINUTE = Kind("tokens_per_minute", 60_000, tokens=True)
TOKEN_DAY = Kind("tokens_per_day", 86_400_000, 10_000, tokens=True)
KINDS = (SECOND, MINUTE, TOKEN_MINUTE, TOKEN_DAY)


@dataclass(frozen=True, slots=True)
class Rule:
    """Limits of one key: "c/CLIENT", "c/CLIENT/MODEL" or "m/MODEL"."""

    key: str
    bounds: tuple[tuple[Kind, int], ...]

    @property
    def counts_tokens(self) -> bool:
        return any(kind.tokens for kind, _ in self.bounds)


@dataclass(frozen=True, slots=True)
class Part:
    """Rules that one shard decides, all or none."""

    shard: int
    rules: tuple[Rule, ...]


Parts = tuple[Part | None, Part | None]


class Rules:
    """`of` gives the parts of a request: that of the client, with what it may use of the model, and that of
    the model itself; None where nothing is limited. What a client has is in one shard, so that it is decided
    in one step."""

    def __init__(self, access: Access) -> None:
        self._clients = {client.name: client for client in access.clients}
        self._models = {shared.model: shared.limits for shared in access.shared}
        self._known: dict[tuple[str, str], Parts] = {}

    def of(self, client: str, model: str) -> Parts:
        parts = self._known.get((client, model))
        if parts is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            parts = self._known[client, model] = self._of_client(client, model), self._of_model(model)
        return parts

    def _of_client(self, name: str, model: str) -> Part | None:
        client = self._clients.get(name)
        if client is None:
            return None
        rules = [_rule(f"c/{name}", client.limits)]
        if model:
            own = next((limits for models, limits in client.model_limits if matches(models, model)), Limits())
            rules.append(_rule(f"c/{name}/{model}", own))
        return _part(name, rules)

    def _of_model(self, model: str) -> Part | None:
        limits = self._models.get(model)
        return _part(model, [_rule(f"m/{model}", limits)]) if limits else None


def limited(access: Access) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Clients and models of which some request has a global limit."""
    clients = tuple(
        client.name
        for client in access.clients
        if any(_bounds(limits) for limits in (client.limits, *(own for _, own in client.model_limits)))
    )
    return clients, tuple(shared.model for shared in access.shared if _bounds(shared.limits))


def shard_of(subject: str) -> int:
    return zlib.crc32(subject.encode()) % SHARDS


def _part(subject: str, rules: list[Rule | None]) -> Part | None:
    found = tuple(rule for rule in rules if rule is not None)
    return Part(shard_of(subject), found) if found else None


def _rule(key: str, limits: Limits) -> Rule | None:
    bounds = _bounds(limits)
    return Rule(key, bounds) if bounds else None


def _bounds(limits: Limits) -> tuple[tuple[Kind, int], ...]:
    """What of them is counted over all gateways."""
    found = ((kind, int(getattr(limits, kind.field))) for kind in KINDS if kind.field not in limits.local)
    return tuple((kind, limit) for kind, limit in found if limit)
