"""The registry's messages as the values of discovery.py, and back."""

from __future__ import annotations

from lingqu.registry.v1 import instances_pb2, models_pb2
from services.core.discovery import (
    Hosted,
    Model,
    Placement,
    Protection,
    Replica,
    Requirements,
    Version,
    VersionKey,
)


def to_replica(record: instances_pb2.Instance) -> Replica:
    hosted = tuple(
        Hosted(VersionKey(m.model, m.version), m.state, m.detail, m.will_retry, m.progress)
        for m in record.models
    )
    endpoints, labels = dict(record.endpoints), dict(record.labels)
    return Replica(record.id, record.service, endpoints, hosted, labels, record.draining)


def to_instance(replica: Replica) -> instances_pb2.Instance:
    return instances_pb2.Instance(
        id=replica.id,
        service=replica.service,
        endpoints=replica.endpoints,
        labels=replica.labels,
        models=[
            instances_pb2.HostedModel(
                model=h.key.model,
                version=h.key.version,
                state=instances_pb2.HostedState.ValueType(h.state),
                detail=h.detail,
                will_retry=h.will_retry,
                progress=h.progress,
            )
            for h in replica.models
        ],
    )


def to_model(record: models_pb2.Model) -> Model:
    versions = tuple(
        Version(
            VersionKey(record.name, v.version),
            v.artifact.uri,
            v.artifact.sha256,
            v.task,
            v.runtime,
            v.artifact.signature,
            v.artifact.signer,
            Requirements(v.requirements.engine, v.requirements.fingerprint),
            v.golden_examples,
            dict(v.evaluation),
            v.stage in (models_pb2.STAGE_RETIRED, models_pb2.STAGE_REJECTED),
            dict(v.labels),
            v.create_time.seconds,
        )
        for v in record.versions
    )
    placement = record.placement
    return Model(
        record.name,
        versions,
        tuple((w.version, w.percent) for w in record.traffic.weights),
        tuple(w.version for w in record.previous_traffic.weights),
        record.traffic.shadow_version,
        dict(record.traffic.aliases),
        Placement(dict(placement.labels), placement.replicas, tuple(placement.keep)),
        record.traffic.shadow_percent or 100,
        protection=_protection(record.policy.protection),
    )


def _protection(record: models_pb2.Protection) -> Protection:
    return Protection(
        record.max_requests,
        record.breaker_error_percent,
        record.breaker_min_requests,
        record.breaker_latency.ToNanoseconds() / 1e9,
        record.breaker_off,
        record.fallback_model,
    )
