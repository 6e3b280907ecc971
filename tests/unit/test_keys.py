"""Keys: who they belong to, how long they last, and what is not accepted."""

from __future__ import annotations

import contextlib
import shutil
import stat
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.core.errors import InvalidInput, NotFound, NotReady, Unauthenticated
from services.core.identity import AUDIENCE, ISSUER
from services.gateway.keys import MAX_FORMER, TTL_MAX_S, KeyRing


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
    keys = ring.jwks()["keys"]
    assert len(keys) == 2  # the one that signs, and the one that will
    assert all(set(key) == {"kty", "crv", "x", "kid", "alg", "use"} for key in keys)


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


@pytest.mark.parametrize("models", [["a b"], [""], ["x" * 65], ["m"] * 33, ["m/"], ["m\n"]])
def test_wrong_models_name_the_field(ring: KeyRing, models: list[str]) -> None:
    with pytest.raises(InvalidInput) as refused:
        ring.mint("alice", models=models)
    assert refused.value.field.startswith("models")


def test_a_key_says_which_models_it_is_for(ring: KeyRing) -> None:
    claims = jwt.decode(ring.mint("alice", models=["a*", "b"]).key, options={"verify_signature": False})
    assert claims["models"] == "a* b"
    assert "models" not in jwt.decode(ring.mint("alice").key, options={"verify_signature": False})


# --- Signing keys -------------------------------------------------------------------------------------


def states(ring: KeyRing) -> list[tuple[str, bool, bool]]:
    return [(key.kid, key.signs, key.until > 0) for key in ring.published]


def test_a_rotation_goes_to_a_key_that_everybody_knows(tmp_path: Path) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    old = f"Bearer {ring.mint('alice').key}"
    (first, _, _), (second, _, _) = states(ring)
    ring.rotate()
    assert states(ring)[0] == (second, True, False)
    assert states(ring)[2] == (first, False, True)
    new = ring.mint("bob")
    assert new.signing_key_id == second
    again = KeyRing.at(tmp_path / "signing.pem")
    assert states(again) == states(ring)
    for found in (ring, again):
        assert found.caller(old).client == "alice"
        assert found.caller(f"Bearer {new.key}").client == "bob"
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert kept == ["signing.lock", "signing.next.pem", "signing.pem", "signing.ring.json"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in tmp_path.glob("*.pem"))


def test_what_another_process_has_changed_is_taken_over(tmp_path: Path) -> None:
    one, two = (KeyRing.at(tmp_path / "signing.pem") for _ in range(2))
    assert not two.reload()
    one.rotate()
    key = f"Bearer {one.mint('alice').key}"
    assert two.caller(key).client == "alice", "the next key was known before"
    assert two.reload()
    assert states(two) == states(one)
    assert not two.reload()
    two.rotate()
    one.rotate()
    two.reload()
    assert states(two) == states(one)
    assert one.caller(key).client == two.caller(key).client == "alice"


def test_a_retired_key_counts_no_more(tmp_path: Path) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    old = ring.mint("alice")
    with pytest.raises(NotReady, match="rotate first"):
        ring.retire(old.signing_key_id)
    ring.rotate()
    ring.retire(old.signing_key_id)
    with pytest.raises(Unauthenticated):
        ring.caller(f"Bearer {old.key}")
    with pytest.raises(NotFound):
        ring.retire(old.signing_key_id)


def test_after_a_leak_nothing_counts_that_could_have_been_signed(tmp_path: Path) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    ring.rotate()
    thief = KeyRing.at(shutil.copytree(tmp_path, tmp_path / "stolen") / "signing.pem")
    forged = [thief.mint("eve").key]
    thief.rotate()
    forged.append(thief.mint("eve").key)
    ring.rotate(retire=True)
    assert len(ring.published) == 2
    for key in forged:
        with pytest.raises(Unauthenticated):
            ring.caller(f"Bearer {key}")
    assert ring.caller(f"Bearer {ring.mint('alice').key}").client == "alice"


def test_a_former_key_is_forgotten_when_all_it_has_signed_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    ring.rotate()
    assert len(ring.published) == 3
    assert abs(ring.published[2].until - time.time() - TTL_MAX_S) < 5
    later = time.time() + TTL_MAX_S + 5
    monkeypatch.setattr(time, "time", lambda: later)
    assert len(KeyRing.at(tmp_path / "signing.pem").published) == 2


def test_former_keys_are_bounded(tmp_path: Path) -> None:
    ring = KeyRing.at(tmp_path / "signing.pem")
    for _ in range(MAX_FORMER):
        ring.rotate()
    with pytest.raises(NotReady, match="retire one"):
        ring.rotate()
    ring.retire(ring.published[-1].kid)
    ring.rotate()


@pytest.mark.parametrize("step", [1, 2])
def test_a_rotation_that_is_interrupted_costs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed before the files are all there."""
    ring = KeyRing.at(tmp_path / "signing.pem")
    old = f"Bearer {ring.mint('alice').key}"
    with monkeypatch.context() as patched:
        if step == 1:
            patched.setattr(Path, "replace", _killed)
        else:  # the next key is in its place, and none is there to be the next
            patched.setattr(KeyRing, "_load", lambda self: None)
        with contextlib.suppress(KeyboardInterrupt):
            ring.rotate()
    again = KeyRing.at(tmp_path / "signing.pem")
    assert again.caller(old).client == "alice"
    assert again.caller(f"Bearer {again.mint('bob').key}").client == "bob"
    again.rotate()
    assert again.caller(old).client == "alice"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
