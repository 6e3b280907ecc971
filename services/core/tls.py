"""Who a part is to the other parts: mutual TLS for every connection between them, with certificates of one CA
that signs nobody else's. Without an identity connections are plain, for parts that share a machine or a mesh.

A certificate that was renewed is used without a restart: servers look at their files at every handshake,
clients when a call begins (renewal.py). Connections that are there go on."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from services.core.renewal import RenewedChannel

log = logging.getLogger(__name__)

# How often files of certificates are looked at.
RENEW_S = 1.0

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM files: a certificate (chain), its key, and the CA of the parts."""

    certificate: Path
    key: Path
    ca: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key, CA. Raises OSError."""
        return self.certificate.read_bytes(), self.key.read_bytes(), self.ca.read_bytes()

    @property
    def written(self) -> tuple[int, ...]:
        """Changes when a file does."""
        return tuple(path.stat().st_mtime_ns for path in (self.certificate, self.key, self.ca))


def channel(address: str, options: Options, identity: Identity | None = None) -> grpc.aio.Channel:
    """To another part, whose certificate has to name the address that is dialled. Raises OSError if the
    identity cannot be read."""
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)

    def made() -> grpc.aio.Channel:
        client_context(identity)  # gRPC would take a wrong key without a word
        certificate, key, ca = identity.read()
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.aio.secure_channel(address, credentials, options=options)

    return RenewedChannel(made, lambda: identity.written)


def listen(server: grpc.aio.Server, address: str, identity: Identity | None = None) -> int:
    """Adds a port to a server; with an identity only for callers that have one, too. Raises RuntimeError if
    it is taken, OSError if a file cannot be read."""
    if identity is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _server_credentials(identity))


def server_context(identity: Identity, protocols: Sequence[str] = ()) -> ssl.SSLContext:
    """The same for servers in the event loop; `renew` it when the files have changed. `protocols`: of ALPN.
    Raises OSError, ssl.SSLError among them."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.verify_mode = ssl.CERT_REQUIRED
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """For clients of HTTP/1.1. Raises OSError, ssl.SSLError among them."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity)


def renew(context: ssl.SSLContext, identity: Identity, protocols: Sequence[str] = ()) -> None:
    """Handshakes of a server from now on go by what is in the files now. Raises as server_context does."""
    now = server_context(identity, protocols)

    def replace(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, former: ssl.SSLContext) -> None:
        connection.context = now

    # Not loaded into the context that there is: it would go on trusting the former CA.
    context.sni_callback = replace


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(identity.certificate, identity.key)
    context.load_verify_locations(identity.ca)
    return context


async def renewing(
    context: ssl.SSLContext | None, identity: Identity | None, protocols: Sequence[str] = ()
) -> None:
    """`renew` it whenever a file changes, for ever; nothing for those who have none."""
    if context is None or identity is None:
        return
    seen = identity.written
    while True:
        await asyncio.sleep(RENEW_S)
        try:
            if (written := identity.written) != seen:
                renew(context, identity, protocols)
                seen = written
        except OSError as err:
            log.warning("the certificate in use stays, the new one cannot be read: %s", err)


def _server_credentials(identity: Identity) -> grpc.ServerCredentials:
    def configuration() -> grpc.ServerCertificateConfiguration:
        certificate, key, ca = identity.read()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    seen = identity.written

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """None: nothing has changed. What cannot be read, half written perhaps, is tried the next time."""
        nonlocal seen
        try:
            written = identity.written
            if written == seen:
                return None
            made = configuration()
        except (OSError, ValueError) as err:
            log.warning("the certificate in use stays, the new one cannot be read: %s", err)
            return None
        seen = written
        return made

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        renewed,  # type: ignore[arg-type] # None is what grpc's documentation asks for
        require_client_authentication=True,
    )
