"""Signatures of artifacts: Ed25519 (RFC 8032) over a model's name and the digest of its artifact.

Who publishes signs; the registry and every inference service verify. The form of the message and of the key's
id is part of the public contract: protos/lingqu/registry/v1/models.proto, `Artifact`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.core.files import write_secret

_PUBLIC_KEYS = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class SignatureRefused(Exception):
    """Nobody who is trusted vouches for this artifact as this model; the text says what is missing."""


class Signer:
    """Signs with one private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.id = key_id(private.public_key())

    @classmethod
    def at(cls, path: Path) -> Signer:
        """The signer whose key is in `path` (PEM); a new one is made there if there is none. Raises
        ValueError if the file is no Ed25519 private key, OSError if it cannot be read or written."""
        if not path.exists():
            private = Ed25519PrivateKey.generate()
            pem = private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_secret(path, pem)
            return cls(private)
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as err:  # TypeError: it has a password
            raise ValueError(f"{path} cannot be used as a private key: {err}") from err
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds no Ed25519 private key")
        return cls(key)

    def sign(self, model: str, sha256: str) -> bytes:
        """64 bytes that vouch for the artifact with this digest as a version of this model."""
        return self._private.sign(_message(model, sha256))

    @property
    def public_pem(self) -> bytes:
        """What goes among the trusted keys of those who verify."""
        return self._private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


class TrustedKeys:
    """Whose signatures count."""

    def __init__(self, keys: Iterable[Ed25519PublicKey]) -> None:
        self._keys = {key_id(key): key for key in keys}

    @classmethod
    def at(cls, path: Path) -> TrustedKeys:
        """The public keys (PEM) in a file, or in all `*.pem` files of a folder. Raises ValueError if there
        are none or a file holds anything else: a mistake here must not switch verification off."""
        try:
            files = sorted(path.glob("*.pem")) if path.is_dir() else [path]
            keys = [key for file in files for key in _public_keys(file)]
        except OSError as err:
            raise ValueError(f"{path} cannot be read: {err.strerror or err}") from err
        if not keys:
            raise ValueError(f"{path} holds no public keys (*.pem)")
        return cls(keys)

    @property
    def ids(self) -> list[str]:
        return sorted(self._keys)

    def verify(self, model: str, sha256: str, signature: bytes, signer: str) -> None:
        """Raises SignatureRefused unless `signer` is trusted and has signed exactly this."""
        if not signature:
            raise SignatureRefused(f'it is not signed, and "{model}" needs a signature by a trusted key')
        key = self._keys.get(signer)
        if key is None:
            raise SignatureRefused(f'its signer "{signer[:64]}" is not among the trusted keys')
        try:
            key.verify(signature, _message(model, sha256))
        except InvalidSignature:
            raise SignatureRefused(
                f'its signature is wrong: {signer} has not signed {sha256} as "{model}"'
            ) from None


def key_id(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def _message(model: str, sha256: str) -> bytes:
    # Neither part can hold a line break: names are checked by the registry, and the digest is hexadecimal.
    return f"lingqu-artifact-v1\n{model}\n{sha256}\n".encode()


def _public_keys(file: Path) -> list[Ed25519PublicKey]:
    content = file.read_bytes()
    if b"PRIVATE KEY" in content:
        raise ValueError(f"{file} holds a private key; only public keys belong here")
    found = []
    for pem in _PUBLIC_KEYS.findall(content):
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as err:
            raise ValueError(f"{file} holds no usable public key: {err}") from err
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"{file} holds a public key that is not Ed25519")
        found.append(key)
    if not found:
        raise ValueError(f"{file} holds no public key")
    return found
