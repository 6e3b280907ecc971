"""Between capacity.proto and advice; every mistake names its field."""

from __future__ import annotations

import math
from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration

from lingqu.metrics.v1 import capacity_pb2 as pb
from services.core.errors import InvalidInput
from services.metrics.capacity.advice import MAX_REPLICAS, Advice, Asked, Limit, Measured
from services.metrics.capacity.queueing import Stay

PERCENTILES = (50.0, 95.0, 99.0)
MAX_RPS = 1e6
DEFAULT_WINDOW_S, MIN_WINDOW_S, MAX_WINDOW_S = 3600.0, 60.0, 7 * 86_400.0
MAX_NAME_LENGTH = 200

_LIMITS = {limit: pb.CapacityLimit.Value(f"CAPACITY_LIMIT_{limit.name}") for limit in Limit}


def to_window(request: pb.GetCapacityRequest) -> float:
    """Seconds. Raises InvalidInput."""
    if not request.HasField("window"):
        return DEFAULT_WINDOW_S
    found = seconds(request.window)
    if not MIN_WINDOW_S <= found <= MAX_WINDOW_S:
        raise InvalidInput("window", "is from a minute to seven days")
    return found


def to_asked(request: pb.GetCapacityRequest) -> Asked:
    """Raises InvalidInput."""
    if not request.model:
        raise InvalidInput("model", "is required")
    if len(request.model) > MAX_NAME_LENGTH or not request.model.isprintable():
        raise InvalidInput("model", f"has at most {MAX_NAME_LENGTH} printable characters")
    rate = request.rps if request.HasField("rps") else None
    if rate is not None and not 0 <= rate <= MAX_RPS:  # NaN is neither
        raise InvalidInput("rps", f"is from 0 to {MAX_RPS:,.0f}")
    if request.replicas > MAX_REPLICAS:
        raise InvalidInput("replicas", f"is at most {MAX_REPLICAS}")
    within: dict[float, float] = {}
    for number, objective in enumerate(request.objectives):
        path = f"objectives[{number}]"
        if objective.percentile not in PERCENTILES:
            raise InvalidInput(f"{path}.percentile", "is 50, 95 or 99")
        if objective.percentile in within:
            raise InvalidInput(f"{path}.percentile", f"{objective.percentile:g} has an objective already")
        latency = seconds(objective.latency)
        if not latency > 0:
            raise InvalidInput(f"{path}.latency", "is more than 0")
        within[objective.percentile] = latency
    return Asked(rate, request.replicas, within)


def to_response(measured: Measured, advice: Advice) -> pb.GetCapacityResponse:
    state = advice.state
    return pb.GetCapacityResponse(
        version=measured.version,
        rps=advice.rate,
        replicas=advice.replicas,
        utilization=advice.utilization,
        max_rps=advice.most,
        max_rps_within_objectives=advice.most_within,
        headroom_rps=advice.most_within - advice.rate,
        latency=_stay(advice.stay),
        bare_latency=_stay(advice.alone),
        replicas_needed=advice.needed,
        limit=_LIMITS[advice.limit],
        concurrency=state.busiest if state else 0,
        waiting_share=state.waits if state else 0.0,
        requests=int(measured.requests),
        age=duration(measured.age_s),
        measured_rps=measured.arrivals,
        peak_rps=measured.peak,
        tokens=measured.tokens,
        prompt_tokens=measured.prompt_tokens,
        variation=measured.variation,
        curve=[
            pb.BatchPoint(concurrency=point.slots, rate=point.rate, measured=duration(point.seconds))
            for point in sorted(measured.points, key=lambda point: point.slots)
            if point.seconds > 0
        ],
        measured_latency=_percentiles(measured.took),
        expected_latency=_stay(advice.expected),
        notes=advice.notes,
    )


def _stay(stay: Stay | None) -> pb.LatencyPercentiles | None:
    if stay is None:
        return None
    return _percentiles({percentile: stay.of(percentile) for percentile in PERCENTILES})


def _percentiles(found: Mapping[float, float]) -> pb.LatencyPercentiles | None:
    if len(found) < len(PERCENTILES):
        return None
    p50, p95, p99 = (duration(found[percentile]) for percentile in PERCENTILES)
    return pb.LatencyPercentiles(p50=p50, p95=p95, p99=p99)


def seconds(value: Duration) -> float:
    return value.seconds + value.nanos * 1e-9


def duration(seconds: float) -> Duration:
    whole = math.floor(seconds)
    return Duration(seconds=whole, nanos=min(999_999_999, round((seconds - whole) * 1e9)))
