"""Other issuers of keys, such as a company's OpenID provider: who they are, and their public keys.

The control plane fetches the keys and hands them to Envoy, so that a provider that is away costs nothing: its
last keys count, also after a restart, and our own keys have nothing to do with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import jwt
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, field_validator
from pydantic_settings import NoDecode

from services.core.backoff import Backoff
from services.core.files import write_whole
from services.core.identity import ISSUER
from services.gateway.filters.authentication import Issuer

log = logging.getLogger(__name__)

MAX_PROVIDERS = 8
MAX_KEYS = 32
MAX_BYTES = 256 << 10
TIMEOUT_S = 5.0
RETRY_MOST_S = 60.0
# Never a shared secret: who verifies with it could sign with it.
_KINDS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_COMMON = ("kty", "kid", "alg", "use")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Provider(BaseModel):
    """One entry of the file that LINGQU_ISSUERS names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    """For logs and file names."""
    issuer: str = Field(min_length=1, max_length=256)
    """The claim `iss`, to the letter."""
    jwks_uri: str = Field(max_length=1024)
    """Where its public keys are: https, or http on this machine."""
    audiences: tuple[str, ...] = Field(min_length=1, max_length=8)
    """At least one of them has to be in the claim `aud`."""
    client_claim: str = Field("sub", pattern=r"^[A-Za-z0-9_.:/-]{1,64}$")
    """The claim that names the client."""
    clock_skew_s: int = Field(30, ge=0, le=300)
    """By how much its clock may differ from Envoy's."""
    refresh_s: int = Field(60, ge=1, le=86_400)
    """How often its keys are fetched."""

    @field_validator("issuer")
    @classmethod
    def _not_ours(cls, value: str) -> str:
        if value == ISSUER:
            raise ValueError(f'"{ISSUER}" is this suite itself')
        return value

    @field_validator("jwks_uri")
    @classmethod
    def _private(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
            raise ValueError("https is needed; http on this machine only")
        return value


def providers_at(path: Path) -> list[Provider]:
    """Raises ValueError, saying what is wrong with the file."""
    try:
        found = TypeAdapter(list[Provider]).validate_json(path.read_bytes())
    except OSError as err:
        raise ValueError(f"{path} cannot be read: {err.strerror}") from err
    for what in ("name", "issuer"):
        if len({getattr(provider, what) for provider in found}) != len(found):
            raise ValueError(f"{path}: two issuers have the same {what}")
    if len(found) > MAX_PROVIDERS:
        raise ValueError(f"{path}: at most {MAX_PROVIDERS} issuers")
    return found


def _read(value: object) -> object:
    return tuple(providers_at(Path(value))) if isinstance(value, str) and value else value or ()


ProvidersFile = Annotated[tuple[Provider, ...], NoDecode, PlainValidator(_read)]
"""A path of such a file, read at once, so that a mistake in it ends the start; empty: none."""


class Fetched:
    """The keys of one provider, kept current. `folder` is where they outlive this process."""

    def __init__(self, provider: Provider, folder: Path, changed: Callable[[], None]) -> None:
        self._provider = provider
        self._file = folder / f"{provider.name}.jwks.json"
        self._changed = changed
        self._jwks = ""
        try:
            self._jwks = public_keys(self._file.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as err:
            log.warning("kept keys of issuer %s are of no use: %s", provider.name, err)

    @property
    def issuer(self) -> Issuer | None:
        """None until its keys have been fetched once."""
        if not self._jwks:
            return None
        of = self._provider
        return Issuer(of.name, of.issuer, of.audiences, self._jwks, of.client_claim, of.clock_skew_s)

    async def run(self) -> None:
        backoff = Backoff(most_s=min(RETRY_MOST_S, self._provider.refresh_s))
        while True:
            try:
                self._take(public_keys(await asyncio.to_thread(_fetch, self._provider.jwks_uri)))
            except (OSError, ValueError) as err:
                held = "its last keys count" if self._jwks else "its keys are refused"
                log.warning("keys of issuer %s: %s; %s", self._provider.name, err, held)
                await asyncio.sleep(backoff.delay())
                continue
            backoff.reset()
            await asyncio.sleep(self._provider.refresh_s)

    def _take(self, jwks: str) -> None:
        if jwks == self._jwks:
            return
        self._jwks = jwks
        self._changed()
        try:
            write_whole(self._file, jwks.encode())
        except OSError as err:
            log.warning("keys of issuer %s cannot be kept: %s", self._provider.name, err)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _fetch(uri: str) -> bytes:
    """Raises OSError. Nothing is followed to another place."""
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler())
    with opener.open(uri, timeout=TIMEOUT_S) as answer:
        body: bytes = answer.read(MAX_BYTES + 1)
    return body


def public_keys(raw: bytes) -> str:
    """A JSON Web Key Set with nothing in it but public keys that can verify. Raises ValueError."""
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 10} KiB")
    try:
        listed = json.loads(raw)["keys"]
        found = [
            _public(key) for key in listed if key.get("kty") in _KINDS and key.get("use", "sig") == "sig"
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError(f"it is no JSON Web Key Set: {err}") from err
    if not 1 <= len(found) <= MAX_KEYS:
        raise ValueError(f"{len(found)} keys in it can verify; 1 to {MAX_KEYS} are needed")
    return json.dumps({"keys": found}, sort_keys=True)


def _public(key: dict[str, Any]) -> dict[str, str]:
    kept = {name: str(key[name]) for name in (*_COMMON, *_KINDS[key["kty"]]) if name in key}
    if not re.fullmatch(r"(RS|PS|ES)(256|384|512)|EdDSA", kept.get("alg", "EdDSA")):
        raise ValueError(f"{kept['alg']} does not sign")
    try:
        jwt.PyJWK(kept)
    except jwt.PyJWTError as err:
        raise ValueError(f"a key in it is broken: {err}") from err
    return kept
