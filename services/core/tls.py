"""Who a part is to the other parts: mutual TLS for every connection between them, with certificates of one CA
that signs nobody else's. Without an identity connections are plain, for parts that share a machine or a mesh.

A certificate that was renewed is used without a restart: grpcio's servers look at their files at every
handshake, those in the event loop every second, clients when a call begins (renewal.py). Connections that are
there go on."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from services.core.renewal import Renewed, RenewedChannel

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
        return grpc.aio.secure_channel(address, channel_credentials(identity), options=options)

    return RenewedChannel(made, lambda: identity.written)


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Of the files as they are now. Raises OSError, ssl.SSLError among them."""
    client_context(identity)  # gRPC would take a wrong key without a word
    certificate, key, ca = identity.read()
    return grpc.ssl_channel_credentials(ca, key, certificate)


def listen(server: grpc.aio.Server, address: str, identity: Identity | None = None) -> int:
    """Adds a port to a server; with an identity only for callers that have one, too. Raises RuntimeError if
    it is taken, OSError if a file cannot be read."""
    if identity is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _server_credentials(identity))


def server_context(identity: Identity, protocols: Sequence[str] = ()) -> ssl.SSLContext:
    """The same for servers in the event loop; `renewing` keeps it current. `protocols`: of ALPN.
    Raises OSError, ssl.SSLError among them."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.verify_mode = ssl.CERT_REQUIRED
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """For clients of HTTP/1.1. Raises OSError, ssl.SSLError among them."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity)


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(identity.certificate, identity.key)
    context.load_verify_locations(identity.ca)
    return context


async def renewing(
    context: ssl.SSLContext | None, identity: Identity | None, protocols: Sequence[str] = ()
) -> None:
    """Whenever a file changes, for ever, let a server's handshakes go by it; nothing for those who have
    none."""
    if context is None or identity is None:
        return
    files = Renewed(lambda: server_context(identity, protocols), lambda: identity.written, context)

    def current(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = files.now

    # Not loaded into the context that there is: it would go on trusting the former CA.
    context.sni_callback = current
    while True:
        await asyncio.sleep(RENEW_S)
        files.renew()


def _server_credentials(identity: Identity) -> grpc.ServerCredentials:
    def configuration() -> grpc.ServerCertificateConfiguration:
        certificate, key, ca = identity.read()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    files = Renewed(configuration, lambda: identity.written)
    return grpc.dynamic_ssl_server_credentials(
        files.now,
        lambda: files.now if files.renew() else None,  # type: ignore[arg-type,return-value] # None: as before
        require_client_authentication=True,
    )
