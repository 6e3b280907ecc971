"""API keys: JWTs signed with Ed25519, which every Envoy verifies by itself (RFC 7519, RFC 8037)."""

from __future__ import annotations

import base64
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.core.errors import InvalidInput
from services.core.files import write_secret
from services.core.identity import ADMIN, AUDIENCE, ISSUER, Caller, identify

TTL_DEFAULT_S = 30 * 86400
TTL_MAX_S = 366 * 86400

_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class Minted:
    """A new key. `key` is a secret; `key_id` is not."""

    key: str
    key_id: str
    expires: int


class KeyRing:
    """Signs and checks keys with one signing key."""

    def __init__(self, signing_key: Ed25519PrivateKey) -> None:
        self._private = signing_key
        self._public = signing_key.public_key()
        raw = self._public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self._x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
        self._kid = self._x[:16]

    @classmethod
    def at(cls, path: Path) -> KeyRing:
        """The ring whose signing key is in `path` (PEM); a new one is made there if there is none."""
        if path.exists():
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
            if not isinstance(key, Ed25519PrivateKey):
                raise ValueError(f"{path} holds no Ed25519 private key")
            return cls(key)
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_secret(path, pem)
        return cls(key)

    def mint(self, client: str, ttl_s: int = TTL_DEFAULT_S, *, admin: bool = False) -> Minted:
        """Raises InvalidInput."""
        if not _CLIENT.fullmatch(client):
            raise InvalidInput("client", "1 to 64 letters, digits, '.', '_', '@' and '-' are needed")
        if not 1 <= ttl_s <= TTL_MAX_S:
            raise InvalidInput("ttl", "1 s to 366 days")
        now = int(time.time())
        key_id = secrets.token_hex(8)
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": client,
            "iat": now,
            "exp": now + ttl_s,
            "jti": key_id,
            "scope": ADMIN if admin else "",
        }
        return Minted(self.sign(claims), key_id, now + ttl_s)

    def sign(self, claims: Mapping[str, object]) -> str:
        """Any claims, as a key."""
        return jwt.encode(dict(claims), self._private, algorithm="EdDSA", headers={"kid": self._kid})

    def caller(self, authorization: str) -> Caller:
        """Who sends this `authorization` value. Raises Unauthenticated."""
        return identify(authorization, [self._public])

    def jwks(self) -> dict[str, object]:
        """The public half, as a JSON Web Key Set."""
        key = {"kty": "OKP", "crv": "Ed25519", "x": self._x, "kid": self._kid, "alg": "EdDSA", "use": "sig"}
        return {"keys": [key]}
