"""Signatures: exactly this artifact as exactly this model, by somebody trusted; or the reason why not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.settings import load
from services.core.signing import SignatureRefused, Signer, TrustedKeys
from services.inference.app import InferenceSettings

SHA = "ab" * 32


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.at(tmp_path / "keys" / "signing.pem")


@pytest.fixture
def trusted(tmp_path: Path, signer: Signer) -> TrustedKeys:
    folder = tmp_path / "trusted"
    folder.mkdir()
    (folder / "release.pem").write_bytes(signer.public_pem)
    return TrustedKeys.at(folder)


def test_a_key_is_made_once_and_kept_private(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "keys" / "signing.pem"
    assert Signer.at(path).id == signer.id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(signer.id) == 16
    assert len(signer.sign("m", SHA)) == 64


def test_the_message_is_the_documented_one(signer: Signer) -> None:
    """protos/lingqu/registry/v1/models.proto says it; other tools sign by it."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_public_key(signer.public_pem)
    key.verify(signer.sign("m", SHA), f"lingqu-artifact-v1\nm\n{SHA}\n".encode())  # type: ignore[call-arg,union-attr,arg-type]


def test_what_was_signed_is_accepted(signer: Signer, trusted: TrustedKeys) -> None:
    trusted.verify("m", SHA, signer.sign("m", SHA), signer.id)
    assert trusted.ids == [signer.id]


def test_the_three_refusals_tell_three_things(tmp_path: Path, signer: Signer, trusted: TrustedKeys) -> None:
    stranger = Signer.at(tmp_path / "stranger.pem")
    with pytest.raises(SignatureRefused, match="not signed"):
        trusted.verify("m", SHA, b"", "")
    with pytest.raises(SignatureRefused, match="not among the trusted keys"):
        trusted.verify("m", SHA, stranger.sign("m", SHA), stranger.id)
    for model, sha256 in (("other", SHA), ("m", "cd" * 32)):
        with pytest.raises(SignatureRefused, match="its signature is wrong"):
            trusted.verify(model, sha256, signer.sign("m", SHA), signer.id)
    with pytest.raises(SignatureRefused, match="its signature is wrong"):  # a borrowed id
        trusted.verify("m", SHA, stranger.sign("m", SHA), signer.id)


@given(position=st.integers(0, 511), length=st.integers(1, 63))
def test_a_changed_or_short_signature_is_wrong(position: int, length: int) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
    signer, trusted = Signer(private), TrustedKeys([private.public_key()])
    signature = bytearray(signer.sign("m", SHA))
    signature[position // 8] ^= 1 << position % 8
    for wrong in (bytes(signature), signer.sign("m", SHA)[:length]):
        with pytest.raises(SignatureRefused, match="wrong"):
            trusted.verify("m", SHA, wrong, signer.id)


def test_several_keys_in_one_file_all_count(tmp_path: Path, signer: Signer) -> None:
    other = Signer.at(tmp_path / "other.pem")
    both = tmp_path / "both.pem"
    both.write_bytes(signer.public_pem + other.public_pem)
    assert TrustedKeys.at(both).ids == sorted([signer.id, other.id])


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"]
)
def test_a_mistake_in_the_trusted_keys_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pem").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pem"):
        TrustedKeys.at(tmp_path)


def test_places_without_keys_and_private_keys_are_refused(tmp_path: Path, signer: Signer) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        TrustedKeys.at(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no public keys"):
        TrustedKeys.at(tmp_path / "empty")
    with pytest.raises(ValueError, match="private key"):
        TrustedKeys.at(tmp_path / "keys")


def test_what_is_no_private_key_is_no_signer(tmp_path: Path, signer: Signer) -> None:
    (tmp_path / "public.pem").write_bytes(signer.public_pem)
    with pytest.raises(ValueError, match=r"public\.pem"):
        Signer.at(tmp_path / "public.pem")


def test_the_setting_is_read_at_the_start(
    tmp_path: Path, trusted: TrustedKeys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert InferenceSettings().trusted_keys is None
    monkeypatch.setenv("LINGQU_TRUSTED_KEYS", str(tmp_path / "trusted"))
    read = InferenceSettings().trusted_keys
    assert read is not None
    assert read.ids == trusted.ids
    monkeypatch.setenv("LINGQU_TRUSTED_KEYS", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        load(InferenceSettings)
    assert "LINGQU_TRUSTED_KEYS" in capsys.readouterr().err
