"""Other issuers: which settings and which keys are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from services.core.settings import load
from services.gateway.app import GatewaySettings
from services.gateway.providers import MAX_BYTES, MAX_KEYS, public_keys

GOOD = {"name": "corp", "issuer": "https://id", "jwks_uri": "https://id/keys", "audiences": ["lingqu"]}
PRIVATE = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048)))
PUBLIC = {name: PRIVATE[name] for name in ("kty", "n", "e")}


def settings(tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch) -> GatewaySettings:
    file = tmp_path / "issuers.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("LINGQU_ISSUERS", str(file))
    return load(GatewaySettings)


def test_issuers_are_read_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = settings(tmp_path, [GOOD], monkeypatch).issuers
    assert (found.name, found.client_claim, found.clock_skew_s) == ("corp", "sub", 30)
    monkeypatch.delenv("LINGQU_ISSUERS")
    assert load(GatewaySettings).issuers == ()


@pytest.mark.parametrize(
    "wrong",
    [
        "{", "{}", [{}], [{**GOOD, "name": "a/b"}], [{**GOOD, "issuer": "lingqu"}], [GOOD, GOOD],
        [{**GOOD, "jwks_uri": "http://id/keys"}], [{**GOOD, "jwks_uri": "file:///etc/passwd"}],
        [{**GOOD, "audiences": []}], [{**GOOD, "secret": "x"}], [{**GOOD, "clock_skew_s": 3600}],
        [{**GOOD, "name": f"n{n}", "issuer": f"i{n}"} for n in range(9)],
    ],
    ids=lambda wrong: json.dumps(wrong)[:60],
)  # fmt: skip
def test_a_mistake_ends_the_start(
    tmp_path: Path, wrong: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        settings(tmp_path, wrong, monkeypatch)
    assert "LINGQU_ISSUERS" in capsys.readouterr().err


def keys(*found: Any) -> bytes:
    return json.dumps({"keys": found}).encode()


def test_only_what_verifies_is_kept() -> None:
    secret = {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}
    encrypts = {**PUBLIC, "use": "enc"}
    made = json.loads(public_keys(keys({**PRIVATE, "kid": "1", "x5c": ["…"]}, secret, encrypts)))
    assert made == {"keys": [{**PUBLIC, "kid": "1"}]}


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b"null", b'{"keys": 7}', b'{"keys": [7]}', keys(), keys({"kty": "oct", "k": "eA"}),
        keys({**PUBLIC, "n": "!"}), keys({"kty": "RSA"}), keys({**PUBLIC, "alg": "HS256"}),
        keys({**PUBLIC, "alg": "none"}), keys(*[PUBLIC] * (MAX_KEYS + 1)), b" " * (MAX_BYTES + 1),
        b"\xff", b"[" * 100_000,
    ],
    ids=lambda raw: raw[:30].decode(errors="replace"),
)  # fmt: skip
def test_what_is_no_key_set_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"no JSON Web Key Set|can verify|KiB"):
        public_keys(raw)
