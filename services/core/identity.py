"""Who calls: the checks of an API key that every service makes alike (RFC 7519, RFC 8037)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from services.core.errors import BackendUnavailable, LingquError, PermissionDenied, Unauthenticated

ISSUER = "lingqu"
AUDIENCE = "lingqu"
ADMIN = "admin"
CLIENT_NAME = "[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
# Models that a key is for, if not for all that its client may call: names in which '*' may stand for any
# text, with spaces between them.
MODELS_CLAIM = "models"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a key belongs to. `key_id` (jti) names the key; it is not a secret."""

    client: str
    admin: bool
    key_id: str = ""


ANONYMOUS = Caller("", admin=False)


def identify(authorization: str, keys: Iterable[Any]) -> Caller:
    """Who sends this `authorization` value, by any of the public keys. Raises Unauthenticated."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("a key is needed: authorization: Bearer <key>")
    problem: Exception | None = None
    for key in keys:
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=["EdDSA"],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={"require": ["exp", "sub"]},
            )
        except jwt.InvalidTokenError as err:
            problem = err
        else:
            admin = ADMIN in str(claims.get("scope", "")).split()
            return Caller(str(claims["sub"]), admin, str(claims.get("jti", "")))
    raise Unauthenticated(f"the key is not valid: {problem or 'no signing key is known'}") from problem


class Callers:
    """Identifies callers by a JSON Web Key Set in a file, which may change. Without one, and for a caller who
    sends no key, the answer is ANONYMOUS; a key that is not valid is always refused."""

    def __init__(self, jwks: Path | None) -> None:
        self._path = jwks
        self._seen = -1
        self._keys: list[Any] = []

    @property
    def known(self) -> bool:
        """Whether there is a key set to know callers by."""
        return self._path is not None

    def of(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """Raises Unauthenticated."""
        sent = next((v for k, v in metadata or () if k == "authorization" and isinstance(v, str)), "")
        if not sent or self._path is None:
            return ANONYMOUS
        return identify(sent, self._current(self._path))

    def check_admin(self, metadata: Iterable[tuple[str, str | bytes]] | None, what: str) -> None:
        """Raises PermissionDenied unless the caller's key has the admin scope. Without a key set nobody is
        known, and whoever reaches the port is trusted."""
        if self.known:
            caller = self.of(metadata)
            require(caller.admin, caller, f"{what}: an admin key is needed")

    def _current(self, path: Path) -> list[Any]:
        try:
            written = path.stat().st_mtime_ns
            if written != self._seen:
                self._keys = [k.key for k in jwt.PyJWKSet.from_dict(json.loads(path.read_text())).keys]
                self._seen = written
        except FileNotFoundError as err:
            raise BackendUnavailable(f"the gateway has not written its key set {path} yet") from err
        except (OSError, ValueError, jwt.PyJWKSetError) as err:
            raise LingquError(f"the key set {path} cannot be read: {err}") from err
        return self._keys


def require(allowed: bool, caller: Caller, what: str) -> None:
    """Raises PermissionDenied, naming the caller."""
    if not allowed:
        who = f'client "{caller.client}"' if caller.client else "a caller without a key"
        raise PermissionDenied(f"{who} may not {what}")
