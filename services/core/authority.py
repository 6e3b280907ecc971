"""A certificate authority in a folder, for suites on one machine and for tests (RFC 5280; SPIFFE IDs as
names). In a cluster, what issues certificates there takes its place."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.core.files import write_secret, write_whole

TRUST_DOMAIN = "lingqu"
DAYS = 365
CA_DAYS = 3650
# Clocks differ.
_EARLIER = datetime.timedelta(minutes=5)
_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, slots=True)
class Authority:
    """`certificate` is what others trust. Its key stays in the folder."""

    certificate: Path
    _key: Path

    @classmethod
    def at(cls, folder: Path, name: str = "ca") -> Authority:
        """The one in the folder; made if it is not there."""
        authority = cls(folder / f"{name}.pem", folder / f"{name}-key.pem")
        if not authority.certificate.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            subject = _named(f"Lingqu {name}")
            made = (
                _builder(subject, subject, key.public_key(), CA_DAYS)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(signs=True), critical=True)
                # A CA and its successor have the same name: this tells which of them a certificate is from.
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            )
            write_secret(authority._key, _pem(key))
            write_whole(authority.certificate, _pem(made.sign(key, hashes.SHA256())))
        return authority

    def issue(
        self,
        path: Path,
        uri: str = "",
        hosts: Sequence[str] = (),
        *,
        common_name: str = "",
        days: float = DAYS,
    ) -> tuple[Path, Path]:
        """Writes a certificate to `path` and its key beside it. `hosts` are names and addresses of a server;
        `uri` and `common_name` say who a client is. A server without either is no client."""
        issuer = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        signer = serialization.load_pem_private_key(self._key.read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)  # noqa: S101 - what `at` has made
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [_host(host) for host in hosts]
        names += [x509.UniformResourceIdentifier(uri)] if uri else []
        usages = ([_SERVER] if hosts else []) + ([_CLIENT] if uri or common_name else [])
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        made = (
            _builder(
                _named(common_name) if common_name else x509.Name([]), issuer.subject, key.public_key(), days
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(by, critical=False)
        )
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=not common_name)
        beside = path.with_name(f"{path.stem}-key.pem")
        write_secret(beside, _pem(key))
        write_whole(path, _pem(made.sign(signer, hashes.SHA256())))
        return path, beside


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(of: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(of, x509.Certificate):
        return of.public_bytes(serialization.Encoding.PEM)
    return of.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
