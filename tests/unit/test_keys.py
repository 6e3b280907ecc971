"""Keys: who they belong to, how long they last, and what is not accepted."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.core.errors import InvalidInput, Unauthenticated
from services.core.identity import AUDIENCE, ISSUER
from services.gateway.keys import TTL_MAX_S, KeyRing


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing.at(tmp_path / "signing.pem")


def test_a_key_says_whose_it_is(ring: KeyRing) -> None:
    caller = ring.caller("Bearer " + ring.mint("alice", 60, admin=True).key)
    assert (caller.client, caller.admin) == ("alice", True)
    assert not ring.caller("bearer " + ring.mint("bob", 60).key).admin


def test_the_signing_key_is_kept_and_private(tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    key = KeyRing.at(path).mint("alice", 60).key
    assert KeyRing.at(path).caller(f"Bearer {key}").client == "alice"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_published_half_holds_no_secret(ring: KeyRing) -> None:
    (key,) = ring.jwks()["keys"]  # type: ignore[misc,attr-defined]
    assert "d" not in key


@pytest.mark.parametrize("authorization", ["", "Bearer ", "Basic abc", "Bearer abc", "Bearer a.b.c"])
def test_what_is_no_key_is_refused(ring: KeyRing, authorization: str) -> None:
    with pytest.raises(Unauthenticated):
        ring.caller(authorization)


def test_keys_of_others_expired_and_unsigned_ones_are_refused(ring: KeyRing) -> None:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "eve", "exp": int(time.time()) + 60}
    foreign = jwt.encode(claims, Ed25519PrivateKey.generate(), algorithm="EdDSA")
    unsigned = jwt.encode(claims, None, algorithm="none")
    expired = ring.mint("alice", 1).key
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            ring.caller(f"Bearer {expired}")
        except Unauthenticated:
            break
    for key in (foreign, unsigned, expired):
        with pytest.raises(Unauthenticated):
            ring.caller(f"Bearer {key}")


@pytest.mark.parametrize(
    ("client", "ttl", "field"),
    [
        ("", 60, "client"),
        ("a b", 60, "client"),
        ("x" * 65, 60, "client"),
        ("a", 0, "ttl"),
        ("a", TTL_MAX_S + 1, "ttl"),
    ],
)
def test_wrong_requests_name_the_field(ring: KeyRing, client: str, ttl: int, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        ring.mint(client, ttl)
    assert refused.value.field == field
