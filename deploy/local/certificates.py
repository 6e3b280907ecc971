"""Certificates of a local suite: a CA for its parts and its public port, another for clients, one certificate
a part. In a cluster, what issues certificates there takes their place."""

from __future__ import annotations

import datetime

from cryptography import x509

from deploy.local.layout import HOST, Layout
from services.core.authority import TRUST_DOMAIN, Authority

PARTS = ("etcd", "registry", "gateway", "inference", "metrics", "triton", "cli")
HOSTS = (HOST, "localhost")
# What expires sooner is issued anew at a start.
LEFT = datetime.timedelta(days=90)


def issue(layout: Layout) -> None:
    """Whatever is missing or expires soon."""
    authority = Authority.at(layout.tls)
    Authority.at(layout.tls, "clients")
    wanted = {name: f"spiffe://{TRUST_DOMAIN}/{name}" for name in PARTS} | {"public": ""}
    for name, uri in wanted.items():
        path = layout.tls / f"{name}.pem"
        if not path.exists() or _expires(path.read_bytes()):
            authority.issue(path, uri, HOSTS)


def _expires(pem: bytes) -> bool:
    end = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    return end - datetime.datetime.now(datetime.UTC) < LEFT
