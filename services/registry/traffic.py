"""What a release makes of a model's traffic: pure functions from one state to the next.

States are Models of which only the fields of traffic and releases matter. The way back is a stack: every
release remembers what it replaced, a rollback takes the top off, the next release goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lingqu.registry.v1 import models_pb2 as pb
from services.core.errors import NothingToRollBack

STABLE, CANARY = "stable", "canary"
History = Callable[[int], pb.Release | None]


def split(model: pb.Model, weights: Mapping[int, int], shadow: int, shadow_percent: int = 0) -> pb.Traffic:
    """Percent by version; names stay."""
    return _traffic(weights, shadow, model.traffic.aliases, shadow_percent)


def all_to(model: pb.Model, version: int) -> pb.Traffic:
    """The end of a promotion: no shadow, no canary, and the version is the stable one."""
    names = {name: v for name, v in model.traffic.aliases.items() if name != CANARY}
    return _traffic({version: 100}, 0, {**names, STABLE: version})


def canary(model: pb.Model, stable: int, version: int, percent: int, shadow_percent: int = 0) -> pb.Traffic:
    """A step of a rollout, with so many percent of the stable version's requests copied to the other one."""
    names = {**model.traffic.aliases, STABLE: stable, CANARY: version}
    shadow = version if shadow_percent else 0
    return _traffic({stable: 100 - percent, version: percent}, shadow, names, shadow_percent)


def named(model: pb.Model, alias: str, version: int) -> pb.Traffic:
    """The same traffic with a name more; or, for version 0, without it."""
    names = {**model.traffic.aliases, alias: version}
    now, left = model.traffic, {n: v for n, v in names.items() if v}
    return _traffic(shares(now), now.shadow_version, left, now.shadow_percent)


def forward(model: pb.Model, after: pb.Traffic) -> pb.Model:
    """A new release: the way back leads to the traffic until now."""
    return _state(model, after, model.last_release + 1, model.traffic, model.release)


def onward(model: pb.Model, after: pb.Traffic) -> pb.Model:
    """A release that belongs to the one before, like a later step of a rollout: the way back stays."""
    return _state(model, after, model.last_release + 1, model.previous_traffic, model.previous_release)


def aside(model: pb.Model, after: pb.Traffic) -> pb.Model:
    """An entry in the history that is no release to come back to, like a new name."""
    return _state(model, after, model.release, model.previous_traffic, model.previous_release)


def back(model: pb.Model, history: History) -> pb.Model:
    """The traffic before the release in effect. Names that people gave stay as they are. What has been taken
    off line since comes back neither by a name nor as a shadow: stable is then the main version.

    Raises NothingToRollBack where there is none, or history does not reach that far."""
    if not model.previous_release and not model.previous_traffic.weights:
        raise NothingToRollBack(f'"{model.name}" has had no other traffic that could be gone back to')
    goal = model.previous_traffic
    offline = {v.version for v in model.versions if v.stage in (pb.STAGE_RETIRED, pb.STAGE_REJECTED)}
    moved = {name: v for name, v in goal.aliases.items() if name in (STABLE, CANARY) and v not in offline}
    if goal.aliases.get(STABLE) in offline and (main := main_version(goal)):
        moved[STABLE] = main
    kept = {name: v for name, v in model.traffic.aliases.items() if name not in (STABLE, CANARY)}
    shadow = goal.shadow_version if goal.shadow_version not in offline else 0
    after = _traffic(shares(goal), shadow, {**kept, **moved}, goal.shadow_percent if shadow else 0)
    made = history(model.previous_release) or pb.Release()
    return _state(model, after, model.previous_release, made.previous_traffic, made.previous_release)


def main_version(traffic: pb.Traffic) -> int:
    """The version with the largest share, the newer of two alike; 0 if there is none."""
    return max(((w.percent, w.version) for w in traffic.weights), default=(0, 0))[1]


def shares(traffic: pb.Traffic) -> dict[int, int]:
    """Percent by version."""
    return {w.version: w.percent for w in traffic.weights}


def serving(traffic: pb.Traffic) -> set[int]:
    """Versions that get requests, or copies of them."""
    return shares(traffic).keys() | ({traffic.shadow_version} - {0})


def _state(
    model: pb.Model, after: pb.Traffic, release: int, previous: pb.Traffic, previous_release: int
) -> pb.Model:
    return pb.Model(
        traffic=after,
        traffic_version=main_version(after),
        previous_traffic=previous,
        previous_version=main_version(previous),
        last_release=model.last_release + 1,
        release=release,
        previous_release=previous_release,
    )


def _traffic(
    weights: Mapping[int, int], shadow: int, aliases: Mapping[str, int], shadow_percent: int = 0
) -> pb.Traffic:
    shares = [pb.Weight(version=v, percent=p) for v, p in sorted(weights.items()) if p]
    return pb.Traffic(weights=shares, shadow_version=shadow, aliases=aliases, shadow_percent=shadow_percent)
