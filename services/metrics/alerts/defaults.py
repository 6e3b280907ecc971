"""Rules that every suite has, on what its parts measure by themselves; docs/operations.md lists them."""

from __future__ import annotations

from services.metrics.alerts.rules import (
    Absence,
    BurnRate,
    BurnWindow,
    Comparison,
    Rule,
    Selection,
    Severity,
    Threshold,
)
from services.metrics.queries import Aggregate

OBJECTIVE = 0.999
# What the suite did wrong, not the caller: gRPC by name, REST by number.
BAD = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "DATA_LOSS", "500", "502", "503", "504")
REFUSED = ("RESOURCE_EXHAUSTED", "429")
_M, _H, _D = 60.0, 3600.0, 86_400.0
_SPOOL_BYTES = float(1 << 29)  # half of what it may have (spool.py)

_REQUESTS = Selection("requests", filters={"api": ("text", "tensor", "rest")}, group_by=("model",))


def _sum(measurement: str, *group_by: str, aggregate: Aggregate = Aggregate.SUM) -> Selection:
    return Selection(measurement, aggregate=aggregate, group_by=group_by)


DEFAULTS = (
    Rule(
        "error-budget-fast",
        BurnRate(
            _REQUESTS,
            {"status": BAD},
            OBJECTIVE,
            (BurnWindow(_H, 5 * _M, 14.4), BurnWindow(6 * _H, 30 * _M, 6.0)),
            least=100,
        ),
        Severity.CRITICAL,
        keep_firing_s=2 * _M,
        summary="model {model} fails {value} times as often as 99.9 % allow",
    ),
    Rule(
        "error-budget-slow",
        BurnRate(_REQUESTS, {"status": BAD}, OBJECTIVE, (BurnWindow(3 * _D, 6 * _H, 1.0),), least=1000),
        summary="model {model} has failed {value} times as often as 99.9 % allow, for days",
    ),
    Rule(
        "replica-down",
        Absence(Selection("lingqu.inference.up", group_by=("service", "instance")), 30.0, 30 * _M),
        Severity.CRITICAL,
        summary="{instance} of {service} has told nothing for {value} s or longer",
    ),
    Rule(
        "triton-down",
        Absence(Selection("triton", "pending", group_by=("triton",)), _M, 30 * _M),
        Severity.CRITICAL,
        summary="Triton {triton} has shown no counters for {value} s or longer",
    ),
    Rule(
        "queue-growing",
        Threshold(
            _sum("lingqu.inference.queue.length", "model", aggregate=Aggregate.MIN),
            _M,
            Comparison.AT_LEAST,
            1.0,
        ),
        for_s=2 * _M,
        keep_firing_s=_M,
        summary="requests to {model} have waited for minutes without a pause: at least {value} in line",
    ),
    Rule(
        "limits-hit",
        BurnRate(
            Selection("requests", group_by=("client",)),
            {"status": REFUSED},
            0.9,
            (BurnWindow(15 * _M, 5 * _M, 1.0),),
            least=50,
        ),
        Severity.INFO,
        keep_firing_s=5 * _M,
        summary="client {client} is refused {value} times the tenth that is usual",
    ),
    Rule(
        "wasted-compute",
        BurnRate(
            Selection("lingqu.inference.requests", group_by=("model",)),
            {"outcome": ("cancelled", "deadline")},
            0.8,
            (BurnWindow(30 * _M, 5 * _M, 1.0),),
            least=50,
        ),
        summary="of requests to {model} more than a fifth is computed for nobody ({value} times that)",
    ),
    Rule(
        "registry-stale",
        Threshold(
            _sum("lingqu.registry.stale", "instance", aggregate=Aggregate.MIN), 30.0, Comparison.ABOVE, 0.0
        ),
        Severity.CRITICAL,
        for_s=30.0,
        summary="registry {instance} has lost etcd and answers what it knew last",
    ),
    Rule(
        "configuration-refused",
        Threshold(_sum("lingqu.gateway.nacks", "kind"), 5 * _M, Comparison.ABOVE, 0.0),
        summary="Envoys have refused {value} configurations of {kind}; `lingqu routes` has their words",
    ),
    Rule(
        "configuration-held-back",
        Threshold(
            _sum("lingqu.gateway.refused", "instance", aggregate=Aggregate.MIN), _M, Comparison.ABOVE, 0.0
        ),
        for_s=_M,
        summary="{instance} holds back {value} configurations that Envoy would refuse",
    ),
    Rule(
        "data-plane-behind",
        Threshold(
            _sum("lingqu.gateway.data_planes.behind", "instance", aggregate=Aggregate.MIN),
            _M,
            Comparison.ABOVE,
            0.0,
        ),
        for_s=_M,
        summary="{value} Envoys of {instance} have not the newest configuration",
    ),
    *(
        Rule(
            name,
            Threshold(
                Selection(
                    "lingqu.certificate.days_left",
                    aggregate=Aggregate.LAST,
                    group_by=("certificate", "instance", "service"),
                ),
                _M,
                Comparison.BELOW,
                days,
            ),
            severity,
            summary="certificate {certificate} of {service} at {instance} expires in {value} days",
        )
        for name, days, severity in (
            ("certificate-expires", 14.0, Severity.WARNING),
            ("certificate-expires-soon", 3.0, Severity.CRITICAL),
        )
    ),
    Rule(
        "store-spool-filling",
        Threshold(Selection("spool", "bytes", Aggregate.LAST), 2 * _M, Comparison.ABOVE, _SPOOL_BYTES),
        Severity.CRITICAL,
        for_s=_M,
        summary="{value} bytes of points wait on disk for the store of metrics",
    ),
    Rule(
        "points-refused",
        Threshold(
            Selection("collector", filters={"what": ("refused",)}, group_by=("why",)),
            5 * _M,
            Comparison.ABOVE,
            1000.0,
        ),
        Severity.INFO,
        summary="{value} points were refused in five minutes: {why}",
    ),
)
