"""What Envoy is told for a few suites, to the letter: whatever changes it shows in a file that is reviewed
(tests/goldens.py says how to renew them). Envoy reads each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.local.layout import Layout
from deploy.local.parts import envoy
from services.core.access import RATES, Access, Client, Limits, RevokedKey, SharedLimits
from services.core.authority import Authority
from services.core.discovery import READY, Hosted, Model, Protection, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.descriptors import descriptor_set
from services.gateway.filters.authentication import Issuer
from services.gateway.listener import Entry, Limiting
from services.gateway.secrets import KeyPair, Secrets
from services.gateway.shares import LAYER
from services.gateway.snapshot import Builder, Snapshot, snapshot
from services.gateway.view import View, view
from tests.goldens import KINDS, Told, compared
from tests.statics import static_of

KEY = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "one"}
# RFC 8037, A.2.
JWKS = {"keys": [{**KEY, "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}
ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", JWKS)


def version(name: str, number: int, task: str = "generate", **labels: str) -> Version:
    return Version(VersionKey(name, number), "file:///x", "0", task, "x", labels=labels)


def replica(number: int, *hosted: tuple[str, int], **labels: str) -> Replica:
    endpoints = {"grpc": 8083, "oip": 8001, "http": 8093}
    at = {name: f"10.0.0.{number}:{port}" for name, port in endpoints.items()}
    return Replica(
        f"r{number}", "inference", at, tuple(Hosted(VersionKey(*key), READY) for key in hosted), labels
    )


def smallest() -> View:
    """One model on one replica."""
    return view([replica(1, ("writer", 1))], [Model("writer", (version("writer", 1),), ((1, 100),))])


def with_policies() -> Snapshot:
    """Everything that the gateway may ask, limit or refuse."""
    both = Limits(5, 100, 2, 1000, 100_000)
    access = Access(
        (
            Client("alice", ("writer", "spare*"), both, max_priority=2),
            Client(
                "bob", limits=replace(both, local=RATES), model_limits=(("writer", Limits(1, local=RATES)),)
            ),
            Client("carol", disabled=True),
        ),
        (RevokedKey("a-key", "alice"),),
        (SharedLimits("writer", Limits(50, 0, 8)), SharedLimits("spare", Limits(0, 60, local=RATES))),
    )
    models = [
        Model("writer", (version("writer", 1),), ((1, 100),), protection=Protection(100, fallback="spare")),
        Model("spare", (version("spare", 1),), ((1, 100),), protection=Protection(no_breaker=True)),
    ]
    seen = view([replica(1, ("writer", 1), ("spare", 1))], models, access, limiters=["10.0.1.1:8081"])
    half_open = [replace(t, admits=20) if t.model == "spare" else t for t in seen.targets]
    entry = replace(
        ENTRY,
        traces="10.0.2.1:4317",
        metrics="10.0.2.2:4317",
        cors_origins=("https://app.example", "https://*.lab.example"),
        issuers=(Issuer("idp", "https://idp.example", ("lingqu",), json.dumps(JWKS), "azp"),),
        known_clients_only=True,
        limits=Limiting(0.5, closed=True),
    )
    return snapshot(replace(seen, targets=tuple(half_open)), entry)


def with_traffic() -> Snapshot:
    """A split whose weights have changed since its routes were made, with a shadow and names; models that
    keep what belongs together on one replica, and a model for tensors; zones, a replica that does not answer,
    two control planes."""
    writer = Model(
        "writer",
        tuple(version("writer", number) for number in (1, 2, 3)),
        ((1, 70), (2, 30)),
        shadow=3,
        shadow_percent=25,
        aliases={"stable": 1, "canary": 2},
    )
    models = [
        writer,
        Model("vectors", (version("vectors", 1, "embed", **{"lingqu.affinity": "session"}),), ((1, 100),)),
        Model("numbers", (version("numbers", 1, "tensor"), version("numbers", 2, "tensor")), ((1, 100),)),
    ]
    hosted = [("writer", 1), ("writer", 2), ("writer", 3), ("vectors", 1), ("numbers", 1)]
    replicas = [replica(1, *hosted, zone="a"), replica(2, *hosted[:2], zone="b"), replica(3, *hosted)]
    planes = [Replica(f"g{n}", "gateway", {"grpc": f"10.0.1.{n}:8081"}) for n in (1, 2)]

    def seen(*weights: tuple[int, int]) -> View:
        split = replace(writer, weights=weights)
        return view(replicas, [split, *models[1:]], None, ["10.0.0.3:8083"], planes)

    builder = Builder()
    builder.build(seen((1, 70), (2, 30)), ENTRY)
    return builder.build(seen((1, 60), (2, 40)), ENTRY)


def with_tls(secrets: Secrets) -> Snapshot:
    """Towards clients, who may be known by a certificate, and between the parts."""
    return snapshot(smallest(), replace(ENTRY, metrics="10.0.2.2:4317", secrets=secrets))


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    folder = tmp_path_factory.mktemp("secrets")
    parts = Authority.at(folder)

    def issued(name: str, uri: str = "") -> KeyPair:
        certificate, key = parts.issue(folder / f"{name}.pem", uri, ["127.0.0.1"])
        return KeyPair(certificate.read_text(), key.read_text())

    return Secrets(
        issued("public"),
        Authority.at(folder, "clients").certificate.read_text(),
        issued("own", "spiffe://lingqu/gateway"),
        parts.certificate.read_text(),
    )


@pytest.fixture(scope="module")
def named(secrets: Secrets) -> Mapping[str, str]:
    """Texts that are others each time, or change with the protos."""
    assert secrets.public is not None
    assert secrets.own is not None
    return {
        "descriptors of the APIs": descriptor_set(),
        "certificate of the public port": secrets.public.certificate,
        "its key": secrets.public.key,
        "CA of clients": secrets.clients,
        "certificate of the gateway": secrets.own.certificate,
        "the gateway's key": secrets.own.key,
        "CA of the parts": secrets.parts,
    }


CASES: Mapping[str, Callable[[Secrets], Snapshot]] = {
    "smallest": lambda secrets: snapshot(smallest(), ENTRY),
    "policies": lambda secrets: with_policies(),
    "traffic": lambda secrets: with_traffic(),
    "tls": with_tls,
}


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_is_the_golden_one_and_envoy_takes_it(
    tmp_path: Path,
    name: str,
    secrets: Secrets,
    named: Mapping[str, str],
    pytestconfig: pytest.Config,
) -> None:
    renew = bool(pytestconfig.getoption("--renew-goldens"))
    base = None if name == "smallest" else Told(CASES["smallest"](secrets), named).value
    told = Told(CASES[name](secrets), named)
    golden = told.meant(compared(name, told, base, renew=renew))
    config = tmp_path / "envoy.json"
    found: dict[str, Any] = {url: golden.get(kind, {}) for kind, url in KINDS.items()}
    values = found[xds.RUNTIME][LAYER]["layer"]
    layers = [{"name": LAYER, "static_layer": values}]
    config.write_text(json.dumps({**static_of(found), "layered_runtime": {"layers": layers}}))
    binary = envoy(Layout(tmp_path)).argv[0]
    checked = subprocess.run(
        [binary, "--mode", "validate", "-c", str(config)], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr[-2000:]
