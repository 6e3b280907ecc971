"""The registry as other services see it: small values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lingqu.registry.v1 import instances_pb2

READY = instances_pb2.HOSTED_STATE_READY
LOADING = instances_pb2.HOSTED_STATE_LOADING
FAILED = instances_pb2.HOSTED_STATE_FAILED


@dataclass(frozen=True, slots=True, order=True)
class VersionKey:
    """A version of a model."""

    model: str
    version: int

    def __str__(self) -> str:
        return f"{self.model} v{self.version}"


@dataclass(frozen=True, slots=True)
class Hosted:
    """A version on a replica; `state` is one of READY, LOADING, FAILED. `will_retry`: a failure that the
    replica tries to get over by itself. `progress`: of its fetching, 0 to 1."""

    key: VersionKey
    state: int
    detail: str = ""
    will_retry: bool = False
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class Replica:
    """A live instance. `endpoints` maps a protocol to "host:port"; one that is `draining` gets no new
    requests."""

    id: str
    service: str
    endpoints: Mapping[str, str] = field(default_factory=dict)
    models: tuple[Hosted, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Requirements:
    """`engine` is a PEP 440 specifier, `fingerprint` a kind of machine; empty: any."""

    engine: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    key: VersionKey
    uri: str
    sha256: str
    task: str
    runtime: str
    signature: bytes = b""
    signer: str = ""
    requirements: Requirements = Requirements()
    golden_examples: int = 0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    offline: bool = False
    """Retired or rejected: nobody loads it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int = 0
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which replicas load a model's versions: those with `labels`, `replicas` of them (0: all)."""

    labels: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 0
    keep: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Protection:
    """How gateways protect a model's replicas, as Protection in models.proto says; 0: the default.
    `fallback`: a model, or empty."""

    max_requests: int = 0
    error_percent: int = 0
    min_requests: int = 0
    latency_s: float = 0.0
    no_breaker: bool = False
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model; `weights` are (version, percent), `previous` the versions that a rollback would give traffic,
    `shadow` a version that gets `shadow_percent` of the requests as copies, or 0."""

    name: str
    versions: tuple[Version, ...]
    weights: tuple[tuple[int, int], ...] = ()
    previous: tuple[int, ...] = ()
    shadow: int = 0
    aliases: Mapping[str, int] = field(default_factory=dict)
    placement: Placement = Placement()
    shadow_percent: int = 100
    protection: Protection = Protection()

    @property
    def traffic(self) -> int:
        """The version with the largest share, the newer of two alike; 0 for none."""
        return max(((percent, version) for version, percent in self.weights), default=(0, 0))[1]
