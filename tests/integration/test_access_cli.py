"""`lingqu clients`, `keys` and `registry` on a real registry that knows callers by their keys."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.local import layout as at
from lingqu.cli.main import app
from lingqu.registry.v1 import access_pb2
from services.gateway.app import GatewaySettings, running
from services.gateway.keys import KeyRing
from tests.conftest import EtcdServer, free_offset
from tests.registries import RegistryProcess

MAIN = "from lingqu.cli.main import main; main()"
STRANGE = "[bold]x[/bold]"


class Cli:
    """Runs `lingqu` on a state folder, as its users do."""

    def __init__(self, state: Path, ring: KeyRing, registry: RegistryProcess) -> None:
        self.state = state
        self.ring = ring
        self.registry = registry
        self.root = ring.mint("root", 600, admin=True)

    async def __call__(self, *args: str, key: str = "") -> tuple[int, str]:
        """Exit code, and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", MAIN, "--state", str(self.state)),
            *("--key", key or self.root.key, *args),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, said.decode()

    async def here(self, *args: str, key: str = "") -> tuple[int, str]:
        """The same in this process, which takes less time."""
        given = ["--state", str(self.state), "--key", key or self.root.key, *args]
        done = await asyncio.to_thread(CliRunner().invoke, app, given)
        return done.exit_code, done.output

    def renew(self) -> None:
        """An admin key by the signing key of now."""
        self.ring.reload()
        self.root = self.ring.mint("root", 600, admin=True)

    async def json(self, *args: str) -> Any:
        code, said = await self(*args, "-o", "json")
        assert code == 0, said
        return json.loads(said)


@pytest.fixture
async def cli(etcd_server: EtcdServer, tmp_path: Path) -> AsyncIterator[Cli]:
    offset = free_offset()
    ring = KeyRing.at(tmp_path / "signing.pem")
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps(ring.jwks()))
    state = tmp_path / "state"
    state.mkdir()
    (state / "suite.json").write_text(json.dumps({"offset": offset, "pid": os.getpid(), "parts": {}}))
    registry = await RegistryProcess.start(
        etcd_server,
        "registry",
        address=f"{at.HOST}:{at.REGISTRY + offset}",
        env={"LINGQU_JWKS": str(jwks)},
    )
    cfg = GatewaySettings(
        gateway_listen=f"{at.HOST}:{at.GATEWAY + offset}",
        registry=registry.address,
        signing_key=tmp_path / "signing.pem",
        jwks=jwks,
        grace_s=0.1,
    )
    async with running(cfg):
        yield Cli(state, ring, registry)
    await registry.stop()


async def test_a_client_is_shown_with_everything_as_it_is_written(cli: Cli) -> None:
    limits = access_pb2.Limits(requests_per_second=5)
    client = access_pb2.Client(
        name="alice",
        models=["smol*"],
        limits=limits,
        model_limits=[access_pb2.ModelLimits(models="minilm*", limits=access_pb2.Limits(tokens_per_day=7))],
        labels={"team": STRANGE},
    )
    await cli.registry.api.access.SetClient(
        access_pb2.SetClientRequest(client=client),
        timeout=5,
        metadata=(("authorization", f"Bearer {cli.root.key}"),),
    )
    assert (await cli.json("clients", "set", "alice", "--disabled"))["disabled"]
    code, said = await cli("clients", "show", "alice")
    assert code == 0, said
    for text in ("alice", "disabled", "smol*", "5 req/s", "minilm*", "7 tok/day", STRANGE):
        assert text in said
    assert (await cli.json("clients", "show", "alice"))["labels"] == {"team": STRANGE}
    assert await cli.json("clients", "delete", "alice") == {}


async def test_limits_of_clients_and_models(cli: Cli) -> None:
    await cli.json("clients", "set", "alice", "--model", "*")
    await cli.json("limits", "set", "--client", "alice", "--tokens-per-day", "7")
    args = ("--client", "alice", "--model", "smol*", "--requests-per-second", "5", "--scope", "local")
    await cli.json("limits", "set", *args)
    await cli.json("limits", "set", "--model", "minilm", "--requests-per-minute", "9")
    listed = await cli.json("limits", "list")
    assert [(row["client"], row["model"]) for row in listed] == [
        ("alice", ""),
        ("alice", "smol*"),
        ("", "minilm"),
    ]
    assert listed[1]["limits"]["scope"] == "SCOPE_LOCAL"
    assert listed[2]["limits"]["requests_per_minute"] == 9
    code, said = await cli("limits", "show", "--client", "alice")
    assert code == 0, said
    for text in ("5 req/s (each gateway)", "7 tok/day", "minilm"):
        assert text in said
    apart = ("--requests-per-minute", "60", "--requests-per-minute-scope", "global")
    await cli.json("limits", "set", "--client", "alice", "--model", "smol*", *apart)
    _, said = await cli("limits", "show", "--client", "alice")
    assert "5 req/s (each gateway), 60 req/min" in said
    assert "60 req/min (each" not in said
    await cli.json("limits", "set", "--client", "alice", "--model", "smol*", "--scope", "local")
    assert "60 req/min (each gateway)" in (await cli("limits", "show", "--client", "alice"))[1]
    await cli.json("limits", "delete", "--client", "alice", "--model", "smol*")
    await cli.json("limits", "delete", "--model", "minilm")
    assert [row["limits"]["tokens_per_day"] for row in await cli.json("limits", "list")] == ["7"]


async def test_tiers_of_limits(cli: Cli) -> None:
    async def done(*args: str) -> Any:
        code, said = await cli.here(*args, "-o", "json")
        assert code == 0, said
        return json.loads(said)

    code, said = await cli.here("clients", "set", "alice", "--model", "*", "--tier", "gold")
    assert code == 1
    assert 'there is no tier "gold"' in said
    await done("limits", "set", "--tier", "gold", "--requests-per-second", "50")
    await done("limits", "set", "--tier", "gold", "--model", "smol*", "--tokens-per-day", "7")
    code, said = await cli.here("clients", "set", "alice", "--model", "*", "--tier", "gold")
    assert (code, "tier gold" in said) == (0, True), said
    await done("keys", "create", "alice", "--tier", "gold", "--for", "90s")
    listed = await done("limits", "list")
    assert [(row["client"], row["tier"], row["model"]) for row in listed] == [
        ("", "gold", ""),
        ("", "gold", "smol*"),
    ]
    for words in (("limits", "show", "--tier", "gold"), ("limits", "list")):
        code, said = await cli.here(*words)
        assert code == 0, said
        for text in ("tier gold", "50 req/s", "7 tok/day"):
            assert text in said
    for words in (("clients", "show", "alice"), ("clients", "list")):
        assert "gold" in (await cli.here(*words))[1]
    code, said = await cli.here("limits", "delete", "--tier", "gold")
    assert (code, "alice" in said) == (1, True), said
    code, said = await cli.here("limits", "set", "--tier", "gold", "--client", "alice")
    assert code == 2, "one or the other"
    await done("limits", "delete", "--tier", "gold", "--model", "smol*")
    await done("clients", "set", "alice", "--tier", "")
    await done("limits", "delete", "--tier", "gold")
    assert await done("limits", "list") == []


async def test_a_key_is_taken_back(cli: Cli) -> None:
    lost = cli.ring.mint("other", 600, admin=True)
    code, said = await cli("keys", "revoke", lost.key_id, "--client", "other", "--reason", STRANGE)
    assert code == 0, said
    code, said = await cli("keys", "revoked")
    assert lost.key_id in said
    assert STRANGE in said
    assert [k["key_id"] for k in await cli.json("keys", "revoked")] == [lost.key_id]
    code, said = await cli("clients", "set", "eve", key=lost.key)
    assert (code, "is revoked" in said) == (1, True), said
    code, said = await cli("clients", "set", "eve", key=cli.ring.mint("eve", 600).key)
    assert (code, "an admin key is needed" in said) == (1, True), said


async def test_keys_are_made_listed_and_rotated(cli: Cli) -> None:
    code, said = await cli.here("keys", "create", "alice", "--for", "2h", "--model", "m*", "--model", "x")
    assert code == 0, said
    assert "of alice for m*, x" in said
    made = await _json(cli, "keys", "create", "bob", "--admin", "--for", "90s")
    listed = await _json(cli, "keys", "list")
    assert [(key["client"], key["admin"], key["models"]) for key in listed] == [
        ("alice", False, ["m*", "x"]),
        ("bob", True, []),
    ]
    assert (await _json(cli, "keys", "list", "--client", "bob"))[0]["key_id"] == made["key_id"]
    code, said = await cli.here("keys", "list")
    for text in ("alice", "m*, x", "all it may", "admin", "root"):
        assert text in said
    before = await _json(cli, "keys", "signing")
    assert [key["state"] for key in before] == ["STATE_SIGNING", "STATE_NEXT"]
    code, said = await cli.here("keys", "rotate")
    assert (code, said.count("signs"), said.count("former")) == (0, 1, 1), said
    assert (await _json(cli, "keys", "signing"))[0]["key_id"] == before[1]["key_id"]
    assert (await _json(cli, "keys", "rotate", "--retire", before[0]["key_id"]))["signing_keys"]
    code, said = await cli.here("keys", "list", key=made["key"])
    assert (code, "not valid" in said) == (1, True), said
    cli.renew()
    code, said = await cli.here("keys", "rotate", "--leaked")
    assert (code, "yours for an hour" in said) == (0, True), said
    assert (await cli.here("keys", "list", key=said.split()[-1]))[0] == 0
    cli.renew()
    for args in (("create", "a b"), ("create", "a", "--for", "soon"), ("create", "a", "--model", "m/")):
        code, said = await cli.here("keys", *args)
        assert (code, "error:" in said) == (1, True), said


async def _json(cli: Cli, *args: str) -> Any:
    code, said = await cli.here(*args, "-o", "json")
    assert code == 0, said
    return json.loads(said)


async def test_a_backup_and_a_restore_answer_programs_too(cli: Cli, tmp_path: Path) -> None:
    await cli.json("clients", "set", "alice", "--model", "*")
    file = str(tmp_path / "x.backup")
    assert (await cli.json("registry", "backup", file))["records"] == "1"
    assert await cli.json("registry", "restore", file, "--overwrite") == {"records": "1", "removed": "0"}
