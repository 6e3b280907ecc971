"""Who may call what, decided by a real Envoy with the gateway's own configuration: keys, clients, models."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.access import Access, Client, RevokedKey
from services.core.patterns import matches
from tests.gates import DESCRIBE, GENERATE, INFER, STREAM, Calls, Gate, field_of, gate, signed

MODELS = ("alone", "team-a.one", "team-b.one", "secret")


@pytest.fixture(scope="module")
async def entry(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gate]:
    clients = (
        Client("everything", ("*",)),
        Client("exact", ("alone",)),
        Client("nothing"),
        Client("off", ("*",), disabled=True),
        Client("team-a", ("team-a.*", "a*o*e")),
    )
    access = Access(clients, (RevokedKey("bad", "everything"),))
    async with gate(tmp_path_factory.mktemp("access"), MODELS, access) as found:
        yield found


@pytest.mark.parametrize(
    ("client", "models"),
    [
        ("everything", MODELS),
        ("exact", ("alone",)),
        ("nothing", ()),
        ("team-a", ("alone", "team-a.one")),
        ("stranger", MODELS),
    ],
)
async def test_a_client_calls_its_models_and_no_others(
    entry: Gate, client: str, models: tuple[str, ...]
) -> None:
    calls = Calls(entry.address, signed(entry.keys, client))
    for model in MODELS:
        name = model.encode()
        wanted = ("OK", "") if model in models else ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED")
        for path in (GENERATE, INFER, DESCRIBE):
            assert await calls.grpc(path, field_of(1, name)) == wanted, (path, model)
        rest = (200, "") if model in models else (403, "model_not_allowed")
        assert await calls.rest(b'{"model": "%s"}' % name) == rest
    assert await calls.get("/v1/models") == 200
    assert await calls.grpc("/inference.GRPCInferenceService/ServerLive", b"") == ("OK", "")


async def test_a_name_that_cannot_be_reaches_nobody(entry: Gate) -> None:
    poisoned = (b"a\nb", b"\x00", b"x" * 100, "é".encode(), b"<none>", b"../x", b'"]', b'alone","alone')
    huge = b"\x0a\x90\x4e" + b"x" * 10_000
    for client, answer in (
        ("nothing", ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED")),
        ("everything", ("INVALID_ARGUMENT", "INVALID_ARGUMENT")),
    ):
        calls = Calls(entry.address, signed(entry.keys, client))
        for path in (GENERATE, INFER, STREAM):
            for message in (*(field_of(1, name) for name in poisoned), huge):
                found = await calls.grpc(path, message)
                assert found == answer or (
                    message == field_of(1, b"<none>") and found[0] == "INVALID_ARGUMENT"
                )


async def test_what_cannot_be_read_is_refused_with_a_reason(entry: Gate) -> None:
    calls = Calls(entry.address, signed(entry.keys, "everything"))
    message = field_of(1, b"alone") + field_of(2, b"a" * 100)
    assert await calls.grpc(GENERATE, message, grpc.Compression.Gzip) == (
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
    )
    assert await calls.grpc("/", message) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


async def test_a_body_without_a_model_is_left_to_inference(entry: Gate) -> None:
    for calls in (
        Calls(entry.address, signed(entry.keys, "nothing")),
        Calls(entry.address, signed(entry.keys, "everything", models="x")),
    ):
        for body in (b"{", b"[]", b'{"model": ""}', b'{"x": 1}'):
            assert await calls.rest(body) == (200, "")
            assert entry.rest.calls[-1].headers.get("x-lingqu-model", "<none>") == "<none>"


@pytest.mark.parametrize(
    ("client", "key_id", "reason", "code"),
    [
        ("everything", "bad", "KEY_REVOKED", "key_revoked"),
        ("stranger", "bad", "KEY_REVOKED", "key_revoked"),
        ("off", "good", "CLIENT_DISABLED", "client_disabled"),
    ],
)
async def test_revoked_keys_and_disabled_clients_are_nobodies(
    entry: Gate, client: str, key_id: str, reason: str, code: str
) -> None:
    calls = Calls(entry.address, signed(entry.keys, client, jti=key_id))
    for path in (GENERATE, INFER, STREAM, "/lingqu.gateway.v1.GatewayService/DescribeRoutes"):
        assert await calls.grpc(path, field_of(1, b"alone")) == ("UNAUTHENTICATED", reason)
    assert await calls.rest(b'{"model": "alone"}') == (401, code)
    assert await calls.get("/v1/models") == 401


@pytest.mark.parametrize(
    ("models", "able"),
    [
        ("alone", ("alone",)),
        ("secret team-*", ("secret", "team-a.one", "team-b.one")),
        ("*", MODELS),
        ("*.one", ("team-a.one", "team-b.one")),
        ("t*a*e", ("team-a.one", "team-b.one")),
        ("t*-a*e", ("team-a.one",)),
        ("*a**n*", ("alone", "team-a.one", "team-b.one")),
        ("alone*alone", ()),
        ("al", ()),
        ("alone.", ()),
        ("*lone* x", ("alone",)),
    ],
)
async def test_a_key_may_be_for_some_models_only(entry: Gate, models: str, able: tuple[str, ...]) -> None:
    calls = Calls(entry.address, signed(entry.keys, models=models))
    for model in MODELS:
        name = model.encode()
        for path in (GENERATE, INFER):
            wanted = ("OK", "") if model in able else ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED")
            assert await calls.grpc(path, field_of(1, name)) == wanted, model
        rest = (200, "") if model in able else (403, "model_not_allowed")
        assert await calls.rest(b'{"model": "%s"}' % name) == rest
    assert await calls.get("/v1/models") == 200


@settings(max_examples=40)
@given(st.lists(st.text("aln*oe", min_size=1, max_size=6), min_size=1, max_size=4))
async def test_the_models_of_a_key_are_patterns_as_everywhere(entry: Gate, patterns: list[str]) -> None:
    calls = Calls(entry.address, signed(entry.keys, models=" ".join(patterns)))
    covered = any(matches(pattern, "alone") for pattern in patterns)
    assert (await calls.grpc(INFER, field_of(1, b"alone")))[0] == ("OK" if covered else "PERMISSION_DENIED")


async def test_a_key_adds_nothing_to_what_its_client_may_call(entry: Gate) -> None:
    calls = Calls(entry.address, signed(entry.keys, "exact", models="secret alone"))
    assert await calls.grpc(INFER, field_of(1, b"alone")) == ("OK", "")
    assert await calls.grpc(INFER, field_of(1, b"secret")) == ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED")


async def test_a_closed_suite_serves_only_those_it_knows(tmp_path_factory: pytest.TempPathFactory) -> None:
    access = Access((Client("known", ("alone",)),))
    folder = tmp_path_factory.mktemp("closed")
    async with gate(folder, MODELS, access, known_clients_only=True) as closed:
        stranger = Calls(closed.address, signed(closed.keys, "stranger"))
        assert await stranger.grpc(INFER, field_of(1, b"alone")) == ("PERMISSION_DENIED", "UNKNOWN_CLIENT")
        assert await stranger.rest(b'{"model": "alone"}') == (403, "unknown_client")
        assert await stranger.get("/v1/models") == 403
        known = Calls(closed.address, signed(closed.keys, "known"))
        assert await known.grpc(INFER, field_of(1, b"alone")) == ("OK", "")
        assert await known.grpc(INFER, field_of(1, b"secret")) == ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED")
        # Health is open to everybody; nobody answers it here.
        nobody = Calls(closed.address, "")
        assert (await nobody.grpc("/grpc.health.v1.Health/Check", b""))[0] == "UNAVAILABLE"


async def test_the_lists_hold_for_json_of_our_own_api_and_for_grpc_web(entry: Gate) -> None:
    calls = Calls(entry.address, signed(entry.keys, "exact"))
    body = b'{"prompt": "x"}'
    for path, status in (
        ("/v1/models/alone:generate", 200),
        ("/v1/models/secret:generate", 403),
        ("/v1/models/secret:generate/../alone:generate", 200),
        ("/v1/models/alone:generate/../secret:generate", 403),
        ("/v1/models/s%65cret:generate", 403),
        ("/v1/models/alone@1:generate", 200),
        ("/v1/models/secret@1:generate", 403),
        ("/v1/models/alone:generate?model=secret", 403),
        ("/v1/models/team-a.one:streamGenerate", 403),
    ):
        entry.text.calls.clear()
        assert await calls.status(path, body) == status, path
        named = [pb.GenerateRequest.FromString(call.messages[0]).model for call in entry.text.calls]
        assert set(named) <= {"alone", "alone@1"}, path
    assert await calls.status("/v1/models/alone:generate", b'{"model": "secret", "prompt": "x"}') == 400
    for name, code in ((b"alone", "0"), (b"secret", "7")):
        message = field_of(1, name)
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        assert await calls.grpc_web(GENERATE, framed) == code


@pytest.mark.parametrize("wish", [b"@1", b"@99", b"@canary", b"@", b"@@", b"@alone"])
async def test_asking_for_a_version_is_no_way_to_another_model(entry: Gate, wish: bytes) -> None:
    for key in (signed(entry.keys, "exact"), signed(entry.keys, models="alone")):
        calls = Calls(entry.address, key)
        for path in (GENERATE, INFER, STREAM):
            code, _ = await calls.grpc(path, field_of(1, b"secret" + wish))
            assert code in ("PERMISSION_DENIED", "INVALID_ARGUMENT"), path
        assert (await calls.rest(b'{"model": "secret%s"}' % wish))[0] in (400, 403)
        assert (await calls.grpc(INFER, field_of(1, b"alone@1")))[0] == "OK"
