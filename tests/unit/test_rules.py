"""Small rules: which versions are wanted, what a session says, what settings are, who holds a port."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.ports import taken
from services.core import errors
from services.core.discovery import Model, Replica, Version, VersionKey
from services.core.interceptors import InFlightLimit, StatusMapper, Tracing, server_stack
from services.core.settings import load
from services.inference.backends import wire
from services.inference.backends.jobs import Job, Sampling
from services.inference.placement import desired
from services.registry.app import RegistrySettings

ME = Replica("me", "inference")


def model(count: int, traffic: int, previous: int) -> Model:
    versions = tuple(
        Version(VersionKey("m", n), "file:///x", "0", "tensor", "python") for n in range(1, count + 1)
    )
    return Model("m", versions, ((traffic, 100),) if traffic else (), (previous,))


@pytest.mark.parametrize(
    ("count", "traffic", "previous", "wanted"),
    [(1, 0, 0, [1]), (3, 1, 0, [1, 3]), (5, 4, 2, [4, 5, 2]), (3, 3, 2, [3, 2]), (3, 2, 3, [2, 3])],
)
def test_wanted_are_the_traffic_the_newest_and_the_way_back(
    count: int, traffic: int, previous: int, wanted: list[int]
) -> None:
    assert [v.key.version for v in desired([model(count, traffic, previous)], ME, [])] == wanted


samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 8192),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
    seed=st.integers(0, 2**64 - 1),
)


@given(st.integers(1, 2**31 - 1), st.lists(st.integers(0, 50_000), min_size=1), samplings)
def test_a_command_arrives_as_it_was_sent(key: int, ids: list[int], sampling: Sampling) -> None:
    command = wire.Command("submit", "s", "secret", key, Job(key, ids, sampling), "00-ab-cd-01")
    assert wire.load(wire.dump(command)) == command


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
commands = st.fixed_dictionaries(
    {},
    optional={"op": st.sampled_from(["open", "submit", "x"]) | json_values}
    | dict.fromkeys(("id", "secret", "key", "input_ids", "sampling"), json_values),
)


@given(st.binary() | commands.map(lambda body: json.dumps(body).encode()))
def test_nonsense_is_refused_and_never_worse(raw: bytes) -> None:
    try:
        assert isinstance(wire.load(raw), wire.Command)
    except ValueError:
        return


@pytest.mark.parametrize("key", [-1, 2**31, 2**70])
def test_a_key_that_does_not_fit_a_step_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match="key"):
        wire.load(wire.dump(wire.Command("cancel", "s", "secret", key)))


def test_the_order_of_the_layers_around_a_handler() -> None:
    kinds: list[Any] = [type(layer) for layer in server_stack(None, 1)]  # type: ignore[arg-type]
    assert kinds == [Tracing, StatusMapper, InFlightLimit]


def test_every_error_has_a_reason_of_its_own_and_a_code() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.LingquError)]
    assert len({k.reason for k in kinds}) == len(kinds)
    for kind in (errors.QueueFull, errors.BackendUnavailable, errors.SlowWatcher):
        details = errors.to_rpc_status(kind("x")).details
        assert [d.TypeName() for d in details] == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]


def test_all_wrong_settings_are_named_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LINGQU_ETCD", "nowhere")
    monkeypatch.setenv("LINGQU_GRACE_S", "soon")
    with pytest.raises(SystemExit) as ended:
        load(RegistrySettings)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert 'LINGQU_ETCD: Value error, "nowhere" is not host:port' in said
    assert "LINGQU_GRACE_S" in said


def test_a_taken_port_says_who_holds_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (problem,) = taken({port: "public"})
    assert problem.startswith(f"port {port} (public) is held by")
    assert "pid" in problem
    assert taken({port: "public"}) == []
