"""Certificates and keys of Envoy, as it gets them: by SDS over the same stream as everything else, so that
one that was renewed is used for new connections, and those that are there go on."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.core import certificates
from services.core.authority import TRUST_DOMAIN
from services.core.certificates import Used
from services.core.tls import Identity
from services.gateway.clusters import ADS, ANY_REST, SHADOW, TRACES

log = logging.getLogger(__name__)

# How often files are looked at.
LOOK_S = 1.0
PUBLIC, CLIENTS, OWN, PARTS = "public", "clients", "own", "parts"
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """PEM texts."""

    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Secrets:
    """`public`: of the public port. `clients`: the CAs (PEM) whose certificates say who a client is. `own`:
    who Envoy is to other parts, and `parts` their CA. What is empty is not used."""

    public: KeyPair | None = None
    clients: str = ""
    own: KeyPair | None = None
    parts: str = ""


@dataclass(frozen=True, slots=True)
class SecretFiles:
    """Where they are; `public` is certificate and key."""

    public: tuple[Path, Path] | None = None
    clients: Path | None = None
    identity: Identity | None = None

    def used(self) -> Iterator[Used]:
        """Files with certificates."""
        if self.public:
            yield Used("public", self.public[0])
        if self.clients:
            yield Used("clients-ca", self.clients, authorities=True)
        yield from certificates.of(self.identity)

    def read(self) -> Secrets:
        """Raises OSError, or ValueError if a file is no PEM."""
        own = self.identity
        return Secrets(
            _pair(*self.public) if self.public else None,
            _pem(self.clients) if self.clients else "",
            _pair(own.certificate, own.key) if own else None,
            _pem(own.ca) if own else "",
        )


class WatchedSecrets:
    """What the files say; `changed` is called when it is something else. Files that cannot be read, or a key
    of another certificate, leave it as it was. Raises OSError or ValueError at first."""

    def __init__(self, files: SecretFiles, changed: Callable[[], None]) -> None:
        self._files = files
        self._changed = changed
        self.current = files.read()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                found = self._files.read()
            except (OSError, ValueError) as err:
                log.warning("the certificates in use stay, the new ones cannot be read: %s", err)
                continue
            if found != self.current:
                self.current = found
                self._changed()


def secrets(of: Secrets) -> list[dict[str, Any]]:
    """SDS resources."""
    pairs = {PUBLIC: of.public, OWN: of.own}
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "tls_certificate": {
                "certificate_chain": {"inline_string": pair.certificate},
                "private_key": {"inline_string": pair.key},
            },
        }
        for name, pair in pairs.items()
        if pair is not None
    ]
    if of.clients:
        found.append({"name": CLIENTS, "validation_context": {"trusted_ca": {"inline_string": of.clients}}})
    if of.parts:
        found.append({"name": PARTS, "validation_context": _parts({"inline_string": of.parts})})
    return found


def downstream(*, clients: bool) -> dict[str, Any]:
    """The transport socket of the public port. `clients`: who shows a certificate is believed to be who it
    says; nobody has to."""
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificate_sds_secret_configs": [_discovered(PUBLIC)],
        **({"validation_context_sds_secret_config": _discovered(CLIENTS)} if clients else {}),
    }
    return _socket(
        "DownstreamTlsContext", {"common_tls_context": common, "require_client_certificate": False}
    )


def secured(cluster: dict[str, Any]) -> dict[str, Any]:
    """A cluster with mutual TLS, unless it is none of parts."""
    name = cluster["name"]
    if name == TRACES:
        return cluster
    rest = name.removeprefix(f"{SHADOW}/").split("/")[0] == ANY_REST
    alpn = "http/1.1" if rest else "h2"
    return {**cluster, "transport_socket": between_parts(alpn)}


def between_parts(alpn: str) -> dict[str, Any]:
    """The transport socket; `alpn` is what is spoken inside: "h2" or "http/1.1"."""
    return _upstream(alpn, _discovered(OWN), _discovered(PARTS))


def upstream_from_files(folder: Path) -> dict[str, Any]:
    """The same before there is a control plane; the folder has what `secret_files` says."""

    def at(name: str) -> dict[str, Any]:
        source = {"path": str(folder / f"{name}.json"), "watched_directory": {"path": str(folder)}}
        return {"name": name, "sds_config": {"path_config_source": source, "resource_api_version": "V3"}}

    return _upstream("h2", at(OWN), at(PARTS))


def secret_files(identity: Identity) -> dict[str, dict[str, Any]]:
    """By file name: secrets that name the files of an identity, for Envoy to read and to watch."""
    watched = {"watched_directory": {"path": str(identity.certificate.parent)}}
    pair = {
        "certificate_chain": {"filename": str(identity.certificate)},
        "private_key": {"filename": str(identity.key)},
    }
    bodies = {
        OWN: {"tls_certificate": {**pair, **watched}},
        PARTS: {"validation_context": {**_parts({"filename": str(identity.ca)}), **watched}},
    }
    return {
        f"{name}.json": {"resources": [{"@type": f"{_TLS}.Secret", "name": name, **body}]}
        for name, body in bodies.items()
    }


def _upstream(alpn: str, own: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": [alpn],
        "tls_certificate_sds_secret_configs": [own],
        "validation_context_sds_secret_config": parts,
    }
    return _socket("UpstreamTlsContext", {"common_tls_context": common})


def _parts(ca: dict[str, str]) -> dict[str, Any]:
    """Any part of this trust domain: addresses come and go, and the CA signs nobody else."""
    name = {"san_type": "URI", "matcher": {"prefix": f"spiffe://{TRUST_DOMAIN}/"}}
    return {"trusted_ca": ca, "match_typed_subject_alt_names": [name]}


def _discovered(name: str) -> dict[str, Any]:
    return {"name": name, "sds_config": ADS}


def _socket(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.transport_sockets.tls", "typed_config": {"@type": f"{_TLS}.{kind}", **config}}


def _pair(certificate: Path, key: Path) -> KeyPair:
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)  # whether they belong together
    return KeyPair(_pem(certificate), _pem(key))


def _pem(path: Path) -> str:
    text = path.read_text()
    if "-----BEGIN " not in text:
        raise ValueError(f"{path} is no PEM file")
    return text
