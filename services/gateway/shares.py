"""How a model's traffic is split, told to Envoys as runtime values: a release is some bytes, not all routes.

Routes choose a version by thresholds of one random number. Each threshold has a runtime key, and as its
default the share for which the routes were made. While a model differs in nothing but its weights its routes
stay, and values of the layer LAYER say what they are now. Routes that are made anew have the shares of that
moment and other keys, so that no value said for the ones before is taken for theirs, nor the other way round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.core.discovery import Model
from services.gateway.splits import thresholds
from services.gateway.view import Target

LAYER = "shares"
_KEY = "lingqu.share"


@dataclass(frozen=True, slots=True)
class Split:
    """What routes are made of. `values` are runtime values that differ from what the routes say."""

    targets: tuple[Target, ...]
    named: tuple[Target, ...]
    models: tuple[Model, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Made:
    """The shares for which a model's routes were made; `model` and `bare` are all but them."""

    model: Model
    bare: tuple[Target, ...]
    percents: tuple[int, ...]
    targets: tuple[Target, ...]


class Shares:
    """Remembers them from one view to the next."""

    def __init__(self) -> None:
        self._made: dict[str, _Made] = {}

    def split(self, targets: Iterable[Target], named: Iterable[Target], models: Sequence[Model]) -> Split:
        found: dict[str, tuple[list[Target], list[Target]]] = {model.name: ([], []) for model in models}
        for target in targets:
            found.setdefault(target.model, ([], []))[0].append(target)
        for target in named:
            found.setdefault(target.model, ([], []))[1].append(target)
        spares = {model.protection.fallback for model in models}
        known = {model.name: model for model in models}
        made: dict[str, _Made] = {}
        values: dict[str, Any] = {}
        split: tuple[list[Target], list[Target]] = [], []
        for name, (weighted, others) in found.items():
            model = known.get(name)
            able = [t for t in others if t.text_endpoints or t.tensor_endpoints]
            served = sorted((*weighted, *able), key=lambda target: target.version)
            if model is None or name in spares or not _may_change(model, served):
                split[0].extend(weighted)
                split[1].extend(others)
                continue
            made[name] = self._of(model, served)
            split[0].extend(made[name].targets)
            split[1].extend(target for target in others if target not in able)
            known[name] = made[name].model
            values |= _values(made[name], [target.percent for target in served])
        self._made = made
        return Split(tuple(split[0]), tuple(split[1]), tuple(known.values()), values)

    def forget(self) -> None:
        """Routes are to say the shares that are now."""
        self._made = {}

    def _of(self, model: Model, served: Sequence[Target]) -> _Made:
        bare = tuple(replace(target, percent=0) for target in served)
        plain = replace(model, weights=(), previous=())
        found = self._made.get(model.name)
        if found is not None and found.bare == bare and found.model == plain:
            return found
        percents = tuple(target.percent for target in served)
        digest = hashlib.sha256(repr((plain, bare, percents)).encode()).hexdigest()[:8]
        keyed = (replace(t, share_key=f"{_KEY}.{model.name}.{digest}.{t.version}") for t in served)
        return _Made(plain, bare, percents, tuple(keyed))


def _may_change(model: Model, served: Sequence[Target]) -> bool:
    """Breakers that are open and models that stand in for others change more than shares."""
    return (
        len(served) > 1
        and not model.protection.fallback
        and any(target.percent for target in served)
        and all(target.admits == 100 for target in served)
    )


def _values(made: _Made, percents: Sequence[int]) -> dict[str, Any]:
    if tuple(percents) == made.percents:
        return {}
    return {
        target.share_key: {"numerator": upto, "denominator": "MILLION"}
        for target, upto in zip(made.targets, thresholds(percents), strict=True)
    }
