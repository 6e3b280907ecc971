"""Where a local suite keeps its state and which ports it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from services.core.tls import Identity

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Layout:
    """`offset` is added to every port, so that suites can run side by side with a `state` folder each.
    `secured`: the public port and the parts speak TLS, with certificates in `tls`."""

    state: Path
    offset: int = 0
    secured: bool = False

    def pair(self, number: int) -> Layout:
        """Ports of the Triton with this number, from 1, and of its inference: STRIDE apart."""
        return replace(self, offset=self.offset + STRIDE * (number - 1))

    def triton(self, number: int = 1) -> Path:
        """State folder of one Triton: its private copy, its model repository."""
        return self.state / numbered("triton", number)

    def port(self, base: int) -> int:
        return base + self.offset

    def address(self, base: int) -> str:
        return f"{HOST}:{self.port(base)}"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def tls(self) -> Path:
        return self.state / "tls"

    @property
    def public_ca(self) -> Path | None:
        """Whose certificate the public port has."""
        return self.tls / "ca.pem" if self.secured else None

    def identity(self, part: str) -> Identity | None:
        """Who a part is to the others; None where connections are plain."""
        if not self.secured:
            return None
        return Identity(self.tls / f"{part}.pem", self.tls / f"{part}-key.pem", self.tls / "ca.pem")

    @property
    def dev_key(self) -> Path:
        return self.state / "dev.key"

    @property
    def publisher_key(self) -> Path:
        """What the bundled models are signed with."""
        return self.state / "publisher.pem"

    @property
    def jwks(self) -> Path:
        """The gateway's public keys."""
        return self.state / "gateway" / "jwks.json"

    def audit(self, part: str) -> Path:
        """What was administered in a part, by whom."""
        return self.state / "audit" / f"{part}.jsonl"

    @property
    def suite_file(self) -> Path:
        """What `lingqu status` reads: ports, and the process of every part."""
        return self.state / "suite.json"


PUBLIC = 8080
GATEWAY = 8081
REGISTRY = 8082
INFERENCE = 8083
INFERENCE_HTTP = 8093
METRICS, METRICS_HTTP = 4317, 4318
TRITON_HTTP, TRITON_GRPC, TRITON_METRICS = 8000, 8001, 8002
ETCD = 2379
ETCD_PEER = 2380
ENVOY_ADMIN = 9901
STRIDE = 1000
MAX_TRITONS = 8


def numbered(part: str, number: int) -> str:
    """ "triton", "triton-2", …"""
    return part if number == 1 else f"{part}-{number}"
