"""Why a request goes where it goes: the rules of routes.py, splits.py and filters/, told, not configured.

A pure function of the view; tests compare what it says with what Envoy does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from services.core.access import Access, Client, Limits
from services.core.discovery import Model
from services.core.errors import (
    BackendUnavailable,
    BreakerOpen,
    ClientDisabled,
    InvalidInput,
    LingquError,
    ModelNotAllowed,
    ModelNotFound,
    VersionNotServed,
)
from services.core.patterns import matches
from services.gateway import breakers
from services.gateway.clusters import SHADOW, backends
from services.gateway.headers import SESSION_HEADER, WANTED_HEADER
from services.gateway.view import Target, View

TEXT, TENSOR, REST = "text", "tensor", "rest"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WANTED = re.compile(r"[A-Za-z0-9-]{1,32}")


@dataclass(frozen=True, slots=True)
class Question:
    """A request: its client, the model as it names it, and its headers. `kind`: the API, "text", "tensor" or
    "rest"; `version` is a tensor request's own."""

    client: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = TEXT
    version: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A cluster that may get the request, with the probability of that, 0 to 1."""

    version: int
    cluster: str
    probability: float
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """`rule` is what decided, in words; `refusal` what the request is answered instead of being sent on.
    `copies` is where a shadow gets one, with its probability; `limits` are those it counts towards."""

    rule: str
    choices: tuple[Choice, ...] = ()
    refusal: LingquError | None = None
    copies: Choice | None = None
    balancing: str = ""
    limits: tuple[str, ...] = ()


def explain(view: View, question: Question) -> Explanation:
    name, _, behind = question.model.partition("@")
    try:
        wanted = _wanted(question, behind)
        _check_client(view.access, question.client, name)
        targets = _targets(view, question.kind, name)
        model = next(m for m in view.models if m.name == name)
        found = _chosen(model, targets, question.kind, wanted)
    except LingquError as refusal:
        return Explanation(str(refusal), refusal=refusal)
    limits = tuple(_limits(view.access, question.client, name))
    reached = found.choices
    if not reached:
        return Explanation(found.rule, refusal=BreakerOpen("the breakers of all versions are open"))
    if not any(choice.endpoints for choice in reached):
        gone = BackendUnavailable("no replica can answer at the moment")
        return Explanation(found.rule, reached, gone, found.copies, "", limits)
    affinity = {target.affinity for target in targets if target.version in {c.version for c in reached}}
    balancing = _balancing(question, affinity)
    return Explanation(found.rule, reached, None, found.copies, balancing, limits)


def _wanted(question: Question, behind: str) -> str:
    """The version asked for. Raises InvalidInput."""
    name, at, _ = question.model.partition("@")
    if not _NAME.fullmatch(name):
        raise InvalidInput("model", "is missing or malformed")
    own = question.version if question.kind == TENSOR else ""
    header = {key.lower(): value for key, value in question.headers.items()}.get(WANTED_HEADER, "")
    asked = [behind] if at else []
    asked += [text for text in (own, header) if text]
    for text in asked:
        if not _WANTED.fullmatch(text):
            raise InvalidInput(WANTED_HEADER, f'"{text[:64]}" is no number or name of a version')
    if len(set(asked)) > 1:
        raise InvalidInput(WANTED_HEADER, f"the request asks for two versions: {', '.join(asked)}")
    return asked[0] if asked else ""


def _check_client(access: Access, name: str, model: str) -> None:
    """Raises ClientDisabled or ModelNotAllowed. Who has no record may call everything."""
    client = _client(access, name)
    if client is None:
        return
    if client.disabled:
        raise ClientDisabled(f'client "{name}" is disabled')
    if not any(matches(pattern, model) for pattern in client.models):
        raise ModelNotAllowed(f'client "{name}" may not call model "{model}"')


def _targets(view: View, kind: str, name: str) -> list[Target]:
    """Raises ModelNotFound."""
    every = [t for t in (*view.targets, *view.named) if t.model == name]
    found = [t for t in every if kind == TENSOR or t.task != "tensor"]
    if not found:
        raise ModelNotFound(name)
    return found


def _chosen(model: Model, targets: list[Target], kind: str, wanted: str) -> Explanation:
    """Raises VersionNotServed."""
    numbers = {target.version: target for target in targets}
    if wanted:
        number = int(wanted) if wanted.isdigit() else model.aliases.get(wanted, 0)
        target = numbers.get(number)
        if target is None or (wanted.isdigit() and str(number) != wanted):
            raise VersionNotServed(model.name, wanted)
        if target.admits == 0:
            raise BreakerOpen(f"the breaker of version {number} is open")
        means = f'"{wanted}", which is version {number}' if not wanted.isdigit() else f"version {number}"
        return Explanation(f"it asks for {means}", (_choice(target, kind, 1.0),))
    shared = [target for target in targets if target.percent]
    got, refused = breakers.shares((target.percent, target.admits) for target in shared)
    total = sum(got) + refused
    choices = tuple(_choice(t, kind, part / total) for t, part in zip(shared, got, strict=True) if part)
    parts = zip(shared, got, strict=True)
    rule = "the model's shares: " + ", ".join(f"v{t.version} {100 * part / total:.4g} %" for t, part in parts)
    if refused:
        rule += f"; breakers refuse {100 * refused / total:.4g} %"
    left = [str(v) for v, _ in model.weights if v not in {t.version for t in shared}]
    if left:
        rule += f"; no replica has version {', '.join(left)} ready, so the others get its share"
    shadow = numbers.get(model.shadow)
    if shadow is None:
        return Explanation(rule, choices)
    own = sum(choice.probability for choice in choices if choice.version == model.shadow)
    copies = _choice(shadow, kind, model.shadow_percent / 100 * (1 - own))  # of the others' requests
    copy = Choice(copies.version, f"{SHADOW}/{copies.cluster}", copies.probability, copies.endpoints)
    return Explanation(rule, choices, copies=copy)


def _choice(target: Target, kind: str, probability: float) -> Choice:
    cluster = f"{kind}/{target.model}/{target.version}"
    return Choice(target.version, cluster, probability, backends(target)[cluster])


def _balancing(question: Question, affinity: set[str]) -> str:
    headers = {key.lower() for key in question.headers}
    if question.kind == TENSOR or affinity <= {"none"}:
        return "the replica with the fewest requests in progress"
    if SESSION_HEADER in headers:
        return f"by the session in {SESSION_HEADER}, at most 1.5 times the mean of requests in progress"
    if "prefix" in affinity:
        return "by the beginning of the prompt, at most 1.5 times the mean of requests in progress"
    return f"at random, since the request has no {SESSION_HEADER}"


def _client(access: Access, name: str) -> Client | None:
    return next((client for client in access.clients if client.name == name), None)


def _limits(access: Access, name: str, model: str) -> list[str]:
    """In words, outermost first."""
    client = _client(access, name)
    found = []
    if client is not None:
        single = next(
            (limits for pattern, limits in client.model_limits if matches(pattern, model)), Limits()
        )
        found += _words(f'client "{name}" of model "{model}"', single)
        found += _words(f'client "{name}"', client.limits)
    for shared in access.shared:
        if shared.model == model:
            found += _words(f'model "{model}"', shared.limits)
    return found


def _words(whose: str, limits: Limits) -> list[str]:
    alone = {"concurrent_requests", *limits.local}
    counted = [(f.name, getattr(limits, f.name)) for f in fields(limits) if f.name != "local"]
    return [
        f"{whose}: {number:,} {name.replace('_', ' ')} "
        f"({'each gateway for itself' if name in alone else 'all gateways together'})"
        for name, number in counted
        if number
    ]
