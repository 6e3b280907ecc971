"""Keys through several gateways, each a control plane with a real Envoy, on one registry and etcd: made,
listed, taken back, rotated; other issuers; and the audit log of it all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf.duration_pb2 import Duration

from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.client import LingquError
from lingqu.gateway.v1 import gateway_pb2 as pb
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import access_pb2, instances_pb2
from services.gateway.app import GatewaySettings, running
from services.gateway.bootstrap import bootstrap
from services.gateway.providers import Fetched, Provider
from tests.conftest import EtcdServer, free_offset
from tests.gates import INFER, Calls, GrpcBackend, field_of, running_envoy
from tests.registries import Api, served
from tests.waiting import until

MODEL = field_of(1, b"m")
OTHER = field_of(1, b"other")


@dataclass
class Site:
    """Gateways with the same signing keys. `calls(key)` are through each of them."""

    folder: Path
    registry: Api
    layouts: list[Layout] = field(default_factory=list)
    admins: list[Any] = field(default_factory=list)

    @property
    def dev(self) -> str:
        return (self.folder / "dev.key").read_text()

    @property
    def metadata(self) -> tuple[tuple[str, str]]:
        return (("authorization", f"Bearer {self.dev}"),)

    async def create(self, client: str, gateway: int = 0, **fields: Any) -> pb.CreateKeyResponse:
        request = pb.CreateKeyRequest(client=client, **fields)
        return await self.admins[gateway].CreateKey(request, metadata=self.metadata, timeout=5)  # type: ignore[no-any-return]

    def calls(self, key: str) -> list[Calls]:
        return [Calls(layout.address(at.PUBLIC), key) for layout in self.layouts]

    async def everywhere(self, key: str, answer: tuple[str, str], message: bytes = MODEL) -> float:
        """How long it took until all gateways answered so, and went on to."""
        begun = time.monotonic()

        async def so() -> bool:
            found = await asyncio.gather(*(calls.grpc(INFER, message) for calls in self.calls(key)))
            return all(one == answer for one in found)

        await until(so, f"{answer} everywhere", every_s=0.005)
        return time.monotonic() - begun


@asynccontextmanager
async def site(
    folder: Path, etcd: EtcdServer, gateways: int, backend: GrpcBackend, **settings: Any
) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(backend.serving())
        jwks = folder / "gateway" / "jwks.json"
        audit = folder / "registry.audit"
        registry = await stack.enter_async_context(served(etcd, jwks=jwks, audit_log=audit))
        made = Site(folder, registry)
        for number in range(gateways):
            layout = Layout(folder / str(number), free_offset())
            cfg = GatewaySettings(
                public_listen=layout.address(at.PUBLIC),
                gateway_listen=layout.address(at.GATEWAY),
                registry=registry.address,
                signing_key=folder / "gateway" / "signing.pem",
                dev_key=folder / "dev.key" if number == 0 else None,
                audit_log=folder / f"gateway-{number}.audit",
                grace_s=0.1,
                **settings,
            )
            await stack.enter_async_context(running(cfg))
            channel = grpc.aio.insecure_channel(cfg.gateway_listen)
            await stack.enter_async_context(channel)
            made.admins.append(GatewayServiceStub(channel))
            made.layouts.append(layout)
            layout.state.mkdir()
            config = layout.state / "envoy.json"
            boot = bootstrap(f"envoy-{number}", cfg.gateway_listen, layout.address(at.ENVOY_ADMIN))
            config.write_text(json.dumps(boot))
            await stack.enter_async_context(running_envoy(config, layout))
        await _serve(made, address)
        yield made


async def _serve(site: Site, address: str) -> None:
    """Models m and other, on one replica; until every gateway routes them."""
    for model in ("m", "other"):
        await site.registry.create(model, metadata=site.metadata)
    record = instances_pb2.Instance(
        id="i1",
        service="inference",
        endpoints={"oip": address},
        models=[
            instances_pb2.HostedModel(model=m, version=1, state=instances_pb2.HOSTED_STATE_READY)
            for m in ("m", "other")
        ],
    )
    request = instances_pb2.RegisterInstanceRequest(instance=record, ttl=Duration(seconds=60))
    await site.registry.instances.RegisterInstance(request, timeout=5)
    for model in ("m", "other"):
        await site.registry.promote(1, model, metadata=site.metadata)
    await site.everywhere(site.dev, ("OK", ""))
    await site.everywhere(site.dev, ("OK", ""), OTHER)


@pytest.fixture(scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("three")
    etcd = EtcdServer(Layout(folder / "etcd", free_offset()))
    await etcd.start()
    async with site(folder, etcd, 3, GrpcBackend()) as made:
        yield made
    await etcd.stop()


async def refused(call: Awaitable[Any]) -> LingquError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return LingquError(caught.value)


async def test_the_life_of_a_key(three: Site) -> None:
    made = await three.create("alice", ttl=Duration(seconds=600), models=["m*"])
    await three.everywhere(made.key, ("OK", ""))
    await three.everywhere(made.key, ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED"), OTHER)

    async def listed(client: str) -> list[pb.Key]:
        request = pb.ListKeysRequest(client=client)
        answer = await three.admins[1].ListKeys(request, metadata=three.metadata, timeout=5)
        return list(answer.keys)

    (key,) = await listed("alice")
    assert (key.key_id, key.created_by, list(key.models)) == (made.key_id, "dev", ["m*"])
    assert key.expire_time.seconds - key.create_time.seconds == 600
    await until(lambda: listed("dev"), "the key of the start is on record, too")

    begun = time.monotonic()
    request = pb.RevokeKeyRequest(key_id=made.key_id, reason="leaked")
    answer = await three.admins[2].RevokeKey(request, metadata=three.metadata, timeout=5)
    assert answer.key.client == "alice"
    await three.everywhere(made.key, ("UNAUTHENTICATED", "KEY_REVOKED"))
    took = time.monotonic() - begun
    assert took < 1, f"{took:.3f} s"
    (key,) = await listed("alice")
    assert key.HasField("revoke_time")
    assert key.revoke_reason == "leaked"

    # Nothing that could be used as a key is in anybody's files.
    secret = made.key.encode()
    for file in three.folder.rglob("*"):
        if file.is_file() and file.name != "dev.key":
            assert secret not in file.read_bytes(), file
    acts = [json.loads(line) for line in (three.folder / "gateway-0.audit").read_text().splitlines()]
    (act,) = (act for act in acts if act.get("made_key_id") == made.key_id)
    assert (act["method"], act["client"], act["outcome"]) == ("CreateKey", "dev", "OK")
    told = [json.loads(line) for line in (three.folder / "registry.audit").read_text().splitlines()]
    (act,) = (act for act in told if act["request"].get("key_id") == made.key_id)
    assert (act["method"], act["client"], act["request"]["reason"]) == ("RevokeKey", "dev", "leaked")


async def test_a_key_can_put_its_client_into_a_tier_whose_limits_hold_at_once(three: Site) -> None:
    """And a change of the tier is one of all its clients, at every gateway."""
    error = await refused(three.create("tiny", tier="free"))
    assert error.code == grpc.StatusCode.NOT_FOUND
    access = three.registry.access

    async def allow(number: int) -> None:
        limits = access_pb2.Limits(requests_per_minute=number, scope=access_pb2.Limits.SCOPE_LOCAL)
        request = access_pb2.SetTierRequest(tier=access_pb2.Tier(name="free", limits=limits))
        await access.SetTier(request, metadata=three.metadata, timeout=5)

    await allow(1)
    client = access_pb2.SetClientRequest(client=access_pb2.Client(name="tiny", models=["*"]))
    await access.SetClient(client, metadata=three.metadata, timeout=5)
    key = (await three.create("tiny", tier="free")).key
    refusal = ("RESOURCE_EXHAUSTED", "RATE_LIMITED")

    async def refusing() -> bool:
        found = await asyncio.gather(*(calls.grpc(INFER, MODEL) for calls in three.calls(key)))
        return {code for code, _ in found} == {refusal[0]}

    await until(refusing, "each gateway has let one through")
    await allow(100_000)
    await three.everywhere(key, ("OK", ""))


async def test_a_disabled_client_is_out_within_a_second_and_comes_back(three: Site) -> None:
    key = (await three.create("bob")).key

    async def disable(disabled: bool) -> float:
        begun = time.monotonic()
        client = access_pb2.Client(name="bob", models=["m"], disabled=disabled)
        request = access_pb2.SetClientRequest(client=client)
        await three.registry.access.SetClient(request, metadata=three.metadata, timeout=5)
        answer = ("UNAUTHENTICATED", "CLIENT_DISABLED") if disabled else ("OK", "")
        await three.everywhere(key, answer)
        return time.monotonic() - begun

    assert await disable(True) < 1
    assert await disable(False) < 1
    await three.everywhere(key, ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED"), OTHER)


async def test_an_administrator_whose_key_is_void_administers_no_more(three: Site) -> None:
    root = await three.create("root", admin=True)
    metadata = (("authorization", f"Bearer {root.key}"),)
    await three.admins[1].ListKeys(pb.ListKeysRequest(), metadata=metadata, timeout=5)
    user = await three.create("user")
    as_user = (("authorization", f"Bearer {user.key}"),)
    for method, request in (
        ("CreateKey", pb.CreateKeyRequest(client="x")),
        ("ListKeys", pb.ListKeysRequest()),
        ("RevokeKey", pb.RevokeKeyRequest(key_id=root.key_id)),
        ("RotateSigningKey", pb.RotateSigningKeyRequest(retire_all=True)),
        ("RetireSigningKey", pb.RetireSigningKeyRequest(key_id="x")),
        ("ListSigningKeys", pb.ListSigningKeysRequest()),
    ):
        error = await refused(getattr(three.admins[0], method)(request, metadata=as_user, timeout=5))
        assert error.code == grpc.StatusCode.PERMISSION_DENIED, method
    revoke = pb.RevokeKeyRequest(key_id=root.key_id)
    await three.admins[0].RevokeKey(revoke, metadata=metadata, timeout=5)
    for admin in three.admins:

        async def out(admin: Any = admin) -> bool:
            try:
                await admin.CreateKey(pb.CreateKeyRequest(client="x"), metadata=metadata, timeout=5)
            except grpc.aio.AioRpcError as err:
                return LingquError(err).reason == "KEY_REVOKED"
            return False

        await until(out, "its key is void there", timeout_s=1)


async def test_a_rotation_is_no_outage_anywhere(three: Site) -> None:
    """Calls with a key of before go on through all gateways; a key of after works at once everywhere, while
    the other control planes have not looked at the files yet."""
    old = (await three.create("alice")).key
    stop = asyncio.Event()
    failures: list[tuple[str, str]] = []

    async def load(calls: Calls) -> None:
        while not stop.is_set():
            if (answer := await calls.grpc(INFER, MODEL)) != ("OK", ""):
                failures.append(answer)

    loads = [asyncio.create_task(load(calls)) for calls in three.calls(old)]
    try:
        before = three.dev
        for gateway in (0, 1):
            request = pb.RotateSigningKeyRequest()
            answer = await three.admins[gateway].RotateSigningKey(request, metadata=three.metadata, timeout=5)
            assert [key.state for key in answer.signing_keys][:2] == [1, 2]
            for calls in three.calls((await three.create("bob", gateway)).key):
                assert await calls.grpc(INFER, MODEL) == ("OK", "")
            await until(lambda: _agree(three), "all control planes have the same ring")
    finally:
        stop.set()
        await asyncio.gather(*loads)
    assert failures == []
    assert three.dev == before
    signing = await three.admins[2].ListSigningKeys(
        pb.ListSigningKeysRequest(), metadata=three.metadata, timeout=5
    )
    former = [key.key_id for key in signing.signing_keys if key.state == pb.SigningKey.STATE_FORMER]
    assert len(former) == 2
    request = pb.RetireSigningKeyRequest(key_id=former[0])
    await three.admins[2].RetireSigningKey(request, metadata=three.metadata, timeout=5)
    await three.everywhere(old, ("UNAUTHENTICATED", "UNAUTHENTICATED"))


async def _agree(site: Site) -> bool:
    rings = []
    for admin in site.admins:
        request = pb.ListSigningKeysRequest()
        answer = await admin.ListSigningKeys(request, metadata=site.metadata, timeout=5)
        rings.append([key.key_id for key in answer.signing_keys])
    return rings.count(rings[0]) == len(rings)


async def test_after_a_leak_everything_is_void_but_who_asked_is_not_locked_out(three: Site) -> None:
    old, dev = (await three.create("alice", admin=True)).key, three.dev
    request = pb.RotateSigningKeyRequest(retire_all=True)
    answer = await three.admins[0].RotateSigningKey(request, metadata=three.metadata, timeout=5)
    for key in (old, dev):
        await three.everywhere(key, ("UNAUTHENTICATED", "UNAUTHENTICATED"))
    await three.everywhere(answer.key, ("OK", ""))
    await three.everywhere(three.dev, ("OK", ""))
    await until(lambda: _agree(three), "all control planes have the same ring")


async def test_without_a_registry_no_key_is_made_and_those_there_are_work(
    tmp_path: Path, etcd_server: EtcdServer
) -> None:
    async with site(tmp_path, etcd_server, 1, GrpcBackend()) as one:
        key = (await one.create("alice")).key
        await etcd_server.kill()
        error = await refused(one.create("bob"))
        assert error.code == grpc.StatusCode.UNAVAILABLE
        for calls in one.calls(key):
            assert await calls.grpc(INFER, MODEL) == ("OK", "")
        await etcd_server.start()


# --- Other issuers ------------------------------------------------------------------------------------


class OpenId:
    """A provider that publishes whatever keys it is told to, or does not answer."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.away = False
        self.asked = 0
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())

    def jwk(self, key: Any, kid: str, alg: str) -> dict[str, Any]:
        algorithm = jwt.algorithms.get_default_algorithms()[alg]
        return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "alg": alg, "use": "sig"}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            body = json.dumps({"keys": self.keys}).encode()
            if not self.away:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"

    def token(self, key: Any = None, kid: str = "r1", alg: str = "RS256", **claims: Any) -> str:
        now = int(time.time())
        body = {"iss": "https://id.example", "aud": "lingqu", "email": "ann@example.com", "exp": now + 600}
        body = {name: value for name, value in {**body, **claims}.items() if value is not None}
        return jwt.encode(body, key or self.rsa, algorithm=alg, headers={"kid": kid})


def provider(uri: str) -> Provider:
    return Provider(
        name="corp",
        issuer="https://id.example",
        jwks_uri=uri,
        audiences=("lingqu",),
        client_claim="email",
        refresh_s=1,
    )


async def test_keys_of_another_issuer(tmp_path: Path, etcd_server: EtcdServer) -> None:
    openid = OpenId()
    openid.keys = [openid.jwk(openid.rsa, "r1", "RS256")]
    backend = GrpcBackend()
    unauthenticated = ("UNAUTHENTICATED", "UNAUTHENTICATED")
    async with openid.serving() as uri:
        settings: dict[str, Any] = {"issuers": (provider(uri),)}
        async with site(tmp_path, etcd_server, 1, backend, **settings) as one:
            token = openid.token()
            await one.everywhere(token, ("OK", ""))
            assert backend.calls[-1].headers["x-lingqu-client"] == "ann@example.com"
            now = int(time.time())
            for what, bad in {
                "another audience": openid.token(aud="others"),
                "expired, beyond the skew": openid.token(exp=now - 60),
                "never expires": openid.token(exp=None),
                "not yet": openid.token(nbf=now + 600),
                "another issuer": openid.token(iss="https://evil.example"),
                "ours, signed by it": openid.token(iss="lingqu"),
                "a key it has not": openid.token(rsa.generate_private_key(65537, 2048)),
                "no client": openid.token(email=None),
                "an impossible client": openid.token(email="a b"),
                "a client of two lines": openid.token(email="a\r\nx-lingqu-model-version: 9"),
                "a client with a zero": openid.token(email="root\0"),
                "a client that is a list": openid.token(email=["root"]),
                "an endless client": openid.token(email="x" * 10_000),
            }.items():
                (answer,) = [await calls.grpc(INFER, MODEL) for calls in one.calls(bad)]
                assert answer in (unauthenticated, ("PERMISSION_DENIED", "PERMISSION_DENIED")), what
            # Within what its clock may be off.
            await one.everywhere(openid.token(exp=now - 5), ("OK", ""))
            await one.everywhere(openid.token(nbf=now + 20), ("OK", ""))
            # It calls models; it does not administer.
            scoped = openid.token(scope="admin", email="dev")
            metadata = (("authorization", f"Bearer {scoped}"),)
            error = await refused(one.admins[0].ListKeys(pb.ListKeysRequest(), metadata=metadata, timeout=5))
            assert error.code == grpc.StatusCode.UNAUTHENTICATED
            # Lists and revocations hold for its clients and tokens, too.
            client = access_pb2.Client(name="ann@example.com", models=["other"])
            request = access_pb2.SetClientRequest(client=client)
            await one.registry.access.SetClient(request, metadata=one.metadata, timeout=5)
            await one.everywhere(token, ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED"))
            named = openid.token(jti="t-1")
            await one.everywhere(named, ("OK", ""), OTHER)
            revoke = pb.RevokeKeyRequest(key_id="t-1")
            await one.admins[0].RevokeKey(revoke, metadata=one.metadata, timeout=5)
            await one.everywhere(named, ("UNAUTHENTICATED", "KEY_REVOKED"), OTHER)
            # It changes its keys.
            openid.keys = [openid.jwk(openid.ec, "e1", "ES256")]
            changed = openid.token(openid.ec, "e1", "ES256", email="eve")
            await one.everywhere(changed, ("OK", ""))
            await one.everywhere(token, unauthenticated)
            # It is gone, or talks nonsense: its last keys count, and ours have nothing to do with it.
            openid.away = True
            asked = openid.asked
            await until(lambda: openid.asked > asked + 1, "it was asked in vain")
            await one.everywhere(changed, ("OK", ""))
            await one.everywhere(one.dev, ("OK", ""))
    # A gateway that starts meanwhile has what was kept.
    kept = Fetched(provider(uri), tmp_path / "gateway" / "issuers", lambda: None).issuer
    assert kept is not None
    assert "e1" in kept.jwks


async def test_a_shared_secret_of_another_issuer_is_no_key(tmp_path: Path, etcd_server: EtcdServer) -> None:
    """Who publishes an HMAC secret has published what signs."""
    openid = OpenId()
    openid.keys = [
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTMyLWI", "kid": "h1", "alg": "HS256"},
        openid.jwk(openid.rsa, "r1", "RS256"),
    ]
    async with openid.serving() as uri:
        settings: dict[str, Any] = {"issuers": (provider(uri),)}
        async with site(tmp_path, etcd_server, 1, GrpcBackend(), **settings) as one:
            await one.everywhere(openid.token(), ("OK", ""))
            forged = openid.token(b"secret-secret-secret-secret-32-b", "h1", "HS256")
            await one.everywhere(forged, ("UNAUTHENTICATED", "UNAUTHENTICATED"))
