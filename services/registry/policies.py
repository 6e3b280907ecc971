"""What a release has to satisfy: pure checks that raise with the reason."""

from __future__ import annotations

import math

from lingqu.registry.v1 import models_pb2
from services.core.errors import BelowThreshold, NotReady
from services.core.identity import Caller, require
from services.core.patterns import matches
from services.registry import stages
from services.registry.stages import Holdings


def check_releaser(model: models_pb2.Model, caller: Caller, what: str) -> None:
    """Raises PermissionDenied unless the caller is on the model's list, if it has one."""
    allowed = model.policy.releasers
    if allowed:
        listed = bool(caller.client) and any(matches(pattern, caller.client) for pattern in allowed)
        require(listed, caller, f'{what} "{model.name}": its policy names others')


def check_version(version: models_pb2.ModelVersion) -> None:
    """Raises WrongStage for a version that is off line."""
    if version.stage in (stages.RETIRED, stages.REJECTED):
        stages.check(version, stages.SERVING)


def check_evaluation(version: models_pb2.ModelVersion, policy: models_pb2.Policy) -> None:
    """Raises BelowThreshold, naming the figure."""
    where = f'version {version.version} of "{version.model}"'
    if policy.require_golden and not version.golden_examples:
        raise BelowThreshold(f"{where} has no golden examples, which its model's policy asks for")
    for threshold in policy.thresholds:
        value = version.evaluation.get(threshold.metric, math.nan)
        problem = violation(threshold, value)
        if problem:
            raise BelowThreshold(f"{where}: {problem}")


def violation(bounds: models_pb2.Threshold, value: float) -> str:
    """What is wrong with a figure; empty if nothing is. NaN, and no figure at all, is never good enough."""
    if math.isnan(value):
        return f"{bounds.metric} is not among its evaluation figures"
    if bounds.HasField("min") and value < bounds.min:
        return f"{bounds.metric} is {value:g}, at least {bounds.min:g} is asked for"
    if bounds.HasField("max") and value > bounds.max:
        return f"{bounds.metric} is {value:g}, at most {bounds.max:g} is asked for"
    return ""


def check_ready(version: models_pb2.ModelVersion, holdings: Holdings, needed: int) -> None:
    """Raises NotReady unless enough live replicas have the version ready."""
    needed = max(1, needed)
    if holdings.ready >= needed:
        return
    why = "; ".join(holdings.refusals) or f"{holdings.loading} loading it"
    raise NotReady(
        f'version {version.version} of "{version.model}" is ready on {holdings.ready} live replicas, '
        f"{needed} {'is' if needed == 1 else 'are'} needed ({why})"
    )
