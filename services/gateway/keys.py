"""API keys: JWTs signed with Ed25519, which every Envoy verifies by itself (RFC 7519, RFC 8037).

The ring of signing keys is a few files beside `signing.pem`:

    signing.pem          the key that signs
    signing.next.pem     the one that will: its public half is published long before it is needed, so that
                         every Envoy and every service has it by then and a rotation is no outage
    signing.ring.json    public halves of those that have signed, each until the last key it may have signed
                         has expired; nobody has their private halves any more

Several processes may share the files: a change of one is seen by the others (`reload`).
"""

from __future__ import annotations

import base64
import fcntl
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.core.errors import InvalidInput, NotFound, NotReady
from services.core.files import write_secret, write_whole
from services.core.identity import ADMIN, AUDIENCE, CLIENT_NAME, ISSUER, MODELS_CLAIM, Caller, identify

TTL_DEFAULT_S = 30 * 86400
TTL_MAX_S = 366 * 86400
MAX_MODELS = 32
MAX_FORMER = 16

_CLIENT = re.compile(CLIENT_NAME)
_MODELS = re.compile(r"[A-Za-z0-9._*-]{1,64}")


@dataclass(frozen=True, slots=True)
class Minted:
    """A new key. `key` is a secret; all else is not. Times are seconds since 1970."""

    key: str
    key_id: str
    client: str
    models: tuple[str, ...]
    admin: bool
    created: int
    expires: int
    signing_key_id: str


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public half. `signs`: new keys are signed with the other half. `until`: when it is forgotten, seconds
    since 1970; 0: not before it was replaced."""

    kid: str
    x: str
    signs: bool = False
    until: int = 0

    @property
    def jwk(self) -> dict[str, str]:
        return {"kty": "OKP", "crv": "Ed25519", "x": self.x, "kid": self.kid, "alg": "EdDSA", "use": "sig"}


class KeyRing:
    """Signs and checks keys. The first of `private` signs, the second will."""

    def __init__(
        self, private: Sequence[Ed25519PrivateKey], former: Iterable[PublicKey] = (), path: Path | None = None
    ) -> None:
        self._path = path
        self._hold(private, former)

    def _hold(self, private: Sequence[Ed25519PrivateKey], former: Iterable[PublicKey]) -> None:
        self._private = private[0]
        self._own = [_public(key, signs=at == 0) for at, key in enumerate(private)]
        self._former = [key for key in former if key.kid != self._own[0].kid]
        raw = (base64.urlsafe_b64decode(key.x + "=") for key in self.published)
        self._verifying = [Ed25519PublicKey.from_public_bytes(found) for found in raw]

    @classmethod
    def at(cls, path: Path) -> KeyRing:
        """The ring whose signing key is in `path` (PEM); what is not there is made. Raises ValueError."""
        ring = cls([Ed25519PrivateKey.generate()], path=path)
        with _locked(path):
            ring._load()
        return ring

    def reload(self) -> bool:
        """Take over what another process has changed; whether there was anything."""
        if self._path is None or _versions(self._path) == self._seen:
            return False
        before = self.published
        with _locked(self._path):
            self._load()
        return self.published != before

    def _load(self) -> None:
        path, standby, ring = _files(self._path)
        private = []
        for file in (path, standby):
            if not file.exists():
                write_secret(file, _pem(Ed25519PrivateKey.generate()))
            private.append(_private(file))
        former = [PublicKey(**key) for key in json.loads(ring.read_text())] if ring.exists() else []
        self._hold(private, [key for key in former if key.until > time.time()])
        self._seen = _versions(path)

    @property
    def published(self) -> list[PublicKey]:
        """All that keys are verified with: the one that signs first, then the next, then former ones."""
        return [*self._own, *self._former]

    def rotate(self, *, retire: bool = False) -> None:
        """Sign with the next key from now on. Keys that were signed go on to work until they expire; with
        `retire` none of them does, nor what is signed with the key that would have been next: for when the
        files have leaked. Raises NotReady."""
        path, standby, ring = _files(self._path)
        with _locked(path):
            self._load()
            if retire:
                write_whole(ring, b"[]")
                standby.unlink()
                write_secret(path, _pem(Ed25519PrivateKey.generate()))
            else:
                if len(self._former) >= MAX_FORMER:
                    raise NotReady(f"{MAX_FORMER} former signing keys are in use: retire one first")
                # In this order, so that whatever is interrupted, no key stops working.
                self._write_former([PublicKey(*_named(self._own[0]), until=int(time.time()) + TTL_MAX_S)])
                standby.replace(path)
            self._load()

    def retire(self, kid: str) -> None:
        """Forget a former signing key: no key it has signed works any more. Raises NotFound, NotReady."""
        with _locked(_files(self._path)[0]):
            self._load()
            if any(key.kid == kid for key in self._own):
                raise NotReady("it signs, or will: rotate first")
            if not any(key.kid == kid for key in self._former):
                raise NotFound(f'there is no signing key "{kid}"')
            self._former = [key for key in self._former if key.kid != kid]
            self._write_former([])
            self._load()

    def _write_former(self, more: Iterable[PublicKey]) -> None:
        kept = [{"kid": key.kid, "x": key.x, "until": key.until} for key in (*self._former, *more)]
        write_whole(_files(self._path)[2], json.dumps(kept).encode())

    def mint(
        self,
        client: str,
        ttl_s: int = TTL_DEFAULT_S,
        *,
        admin: bool = False,
        models: Sequence[str] = (),
    ) -> Minted:
        """A key for some models, or without any for all that the client may call. Raises InvalidInput."""
        if not _CLIENT.fullmatch(client):
            raise InvalidInput("client", "1 to 64 letters, digits, '.', '_', '@' and '-' are needed")
        if not 1 <= ttl_s <= TTL_MAX_S:
            raise InvalidInput("ttl", "1 s to 366 days")
        if len(models) > MAX_MODELS:
            raise InvalidInput("models", f"at most {MAX_MODELS}; '*' stands for any text")
        for index, pattern in enumerate(models):
            if not _MODELS.fullmatch(pattern):
                raise InvalidInput(f"models[{index}]", "a name in which '*' may stand for any text is needed")
        now, key_id = int(time.time()), secrets.token_hex(8)
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": client,
            "iat": now,
            "exp": now + ttl_s,
            "jti": key_id,
            "scope": ADMIN if admin else "",
            **({MODELS_CLAIM: " ".join(models)} if models else {}),
        }
        key = self.sign(claims)
        return Minted(key, key_id, client, tuple(models), admin, now, now + ttl_s, self._own[0].kid)

    def sign(self, claims: Mapping[str, object]) -> str:
        """Any claims, as a key."""
        return jwt.encode(dict(claims), self._private, algorithm="EdDSA", headers={"kid": self._own[0].kid})

    def caller(self, authorization: str) -> Caller:
        """Who sends this `authorization` value. Raises Unauthenticated."""
        return identify(authorization, self._verifying)

    def jwks(self) -> dict[str, Any]:
        """The public halves, as a JSON Web Key Set."""
        return {"keys": [key.jwk for key in self.published]}


def _files(path: Path | None) -> tuple[Path, Path, Path]:
    if path is None:
        raise NotReady("this ring is not kept in files")
    return path, path.with_suffix(f".next{path.suffix}"), path.with_suffix(".ring.json")


def _versions(path: Path) -> list[tuple[int, int]]:
    """Change whenever one of the files is replaced."""
    found = (file.stat() if file.exists() else None for file in _files(path))
    return [(stat.st_ino, stat.st_mtime_ns) if stat else (0, 0) for stat in found]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _private(path: Path) -> Ed25519PrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} holds no Ed25519 private key")
    return key


def _public(key: Ed25519PrivateKey, *, signs: bool) -> PublicKey:
    x = base64.urlsafe_b64encode(key.public_key().public_bytes_raw()).rstrip(b"=").decode()
    return PublicKey(x[:16], x, signs)


def _named(key: PublicKey) -> tuple[str, str]:
    return key.kid, key.x
