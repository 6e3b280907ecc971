"""Shares of versions, and versions asked for by number or name, through a real Envoy on all three paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2 as oip

from services.gateway.explain import Question, explain
from tests.dataplane import DataPlane, FakeReplica, dataplane, model, replicas

# One in a thousand runs would be unlucky with a right split.
CHI_SQUARE = {1: 10.83, 2: 13.82}


@pytest.fixture(scope="module")
async def gate(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[DataPlane, list[FakeReplica]]]:
    """m: v1 70 %, v2 30 %, v3 ready and without traffic, v4 not ready anywhere; v3 is the shadow of s."""
    async with replicas("one", "two", "three") as found, dataplane(tmp_path_factory.mktemp("gate")) as plane:
        one, two, three = found
        models = [
            model("m", {1: 70, 2: 30}, versions=4, aliases={"stable": 1, "canary": 3, "away": 4}),
            model("only", {1: 100}, task="tensor"),
        ]
        hosts = [
            one.hosting(("m", 1), ("only", 1)),
            two.hosting(("m", 2)),
            three.hosting(("m", 3)),
        ]
        await plane.publish(hosts, models)
        yield plane, found


@pytest.fixture
def plane(gate: tuple[DataPlane, list[FakeReplica]]) -> DataPlane:
    for replica in gate[1]:
        replica.seen.clear()
    return gate[0]


async def text(plane: DataPlane, name: str, **headers: str) -> tuple[str, str]:
    answer = await plane.generate(name, **headers)
    return answer.text, answer.model_version


async def tensor(plane: DataPlane, name: str, **headers: str) -> tuple[str, str]:
    answer = await plane.infer(name, **headers)
    return answer.id, answer.model_version


async def rest(plane: DataPlane, name: str, **headers: str) -> tuple[str, str]:
    answer = (await plane.chat(name, **headers)).json()
    return answer["server"], answer["version"]


Ask = Callable[..., Awaitable[tuple[str, str]]]
ways = pytest.mark.parametrize("ask", [text, tensor, rest])


@ways
async def test_versions_get_their_shares(plane: DataPlane, ask: Ask) -> None:
    """Chi-square of 600 requests with the weights, p = 0.001."""
    total, shares = 600, {("one", "1"): 0.7, ("two", "2"): 0.3}
    found: Counter[tuple[str, str]] = Counter([await ask(plane, "m") for _ in range(total)])
    assert set(found) == set(shares)
    distance = sum((found[k] - total * p) ** 2 / (total * p) for k, p in shares.items())
    assert distance < CHI_SQUARE[1], found


async def test_a_release_leaves_the_routes_and_changes_the_shares(gate: Any) -> None:
    """Streams that are open stay where they are: nothing of theirs is touched."""
    plane, (one, two, three) = gate
    before = plane.view
    hosts = [one.hosting(("m", 1), ("only", 1)), two.hosting(("m", 2)), three.hosting(("m", 3))]
    routes = plane.routes_version
    try:
        for weights in ({3: 100}, {1: 50, 3: 50}, {2: 20, 3: 80}, {1: 70, 2: 30}):
            models = [
                replace(m, weights=tuple(weights.items())) if m.name == "m" else m for m in before.models
            ]
            await plane.publish(hosts, models)
            assert plane.routes_version == routes
            shares = {str(v): percent / 100 for v, percent in weights.items()}
            for ask in (text, tensor, rest):
                found = Counter([(await ask(plane, "m"))[1] for _ in range(150)])
                assert set(found) == set(shares)
                distance = sum((found[v] - 150 * p) ** 2 / (150 * p) for v, p in shares.items())
                assert distance < CHI_SQUARE[1], found
    finally:
        await plane.publish(hosts, before.models)


@ways
@pytest.mark.parametrize(
    ("wanted", "server"),
    [("1", ("one", "1")), ("2", ("two", "2")), ("3", ("three", "3")), ("stable", ("one", "1")),
     ("canary", ("three", "3"))],
)  # fmt: skip
async def test_who_asks_for_a_version_gets_it(
    plane: DataPlane, ask: Ask, wanted: str, server: tuple[str, str]
) -> None:
    for _ in range(4):
        assert await ask(plane, "m", lingqu_version=wanted) == server
        assert await ask(plane, f"m@{wanted}") == server
    assert await ask(plane, f"m@{wanted}", lingqu_version=wanted) == server


async def test_triton_is_told_the_real_name_and_version(plane: DataPlane, gate: Any) -> None:
    for name, version in (("m@canary", ""), ("m@3", ""), ("m", "3"), ("m@3", "3")):
        answer = await plane.infer(name, version)
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "three")
    about = oip.ModelMetadataRequest(name="m@canary")
    answer = await plane.tensor.ModelMetadata(about, metadata=plane.metadata, timeout=10)
    assert (answer.name, list(answer.versions)) == ("m", ["3"])


async def test_inference_is_told_which_version_it_is_for(plane: DataPlane, gate: Any) -> None:
    await plane.generate("m@canary")
    await plane.chat("m@canary")
    (one, two) = gate[1][2].seen
    assert [one.version, two.version] == ["3", "3"]
    assert two.headers["x-lingqu-model"] == "m"


async def test_a_stream_of_tensors_stays_with_the_version_asked_for(plane: DataPlane) -> None:
    async def asked(names: list[str]) -> list[tuple[str, str, str]]:
        requests = iter([oip.ModelInferRequest(model_name=n, id="x" * 100) for n in names])
        call = plane.tensor.ModelStreamInfer(requests, metadata=plane.metadata, timeout=10)
        return [
            (r.infer_response.model_name, r.infer_response.model_version, r.infer_response.id)
            async for r in call
        ]

    assert await asked(["m@canary"] * 3) == [("m", "3", "three")] * 3
    (first, *others) = await asked(["m"] * 5)
    assert first in (("m", "1", "one"), ("m", "2", "two"))
    assert others == [first] * 4


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and message."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    status = rpc_status.from_call(refused.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return refused.value.code(), info.reason, refused.value.details() or ""


async def test_a_version_that_is_not_served_is_refused_by_name(plane: DataPlane) -> None:
    for wanted in ("4x", "7", "nightly", "0", "01"):
        for call in (plane.generate(f"m@{wanted}"), plane.infer("m", lingqu_version=wanted)):
            code, reason, message = await refusal(call)
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "VERSION_NOT_SERVED")
            assert f'version "{wanted}" of model "m"' in message
        answer = await plane.chat(f"m@{wanted}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "version_not_served"
        assert f'version "{wanted}" of model "m"' in answer.json()["error"]["message"]
    assert (await refusal(plane.infer("m", "7")))[1] == "VERSION_NOT_SERVED"


async def test_a_named_version_without_replicas_is_unavailable(plane: DataPlane) -> None:
    assert (await refusal(plane.generate("m@away")))[0] == grpc.StatusCode.UNAVAILABLE


async def test_malformed_and_contradicting_wishes_are_refused(plane: DataPlane) -> None:
    for call in (
        plane.generate("m", lingqu_version="no such"),
        plane.generate("m@"),
        plane.generate("m@a@b"),
        plane.infer("m", "x" * 33),
        plane.infer("m@1", "2"),
        plane.generate("m@1", lingqu_version="2"),
    ):
        code, reason, message = await refusal(call)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        assert message.startswith("lingqu-version: ")
    answer = await plane.chat("m@1", lingqu_version="2")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lingqu-version")
    assert (await refusal(plane.generate("@1")))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert (await refusal(plane.generate("none@1")))[1] == "MODEL_NOT_FOUND"


async def test_a_message_is_left_as_it_is_where_nothing_has_to_be_added(plane: DataPlane, gate: Any) -> None:
    assert (await plane.infer("only")).model_version == ""
    assert (await plane.infer("only", "1")).model_version == "1"
    assert (await plane.infer("only@1")).model_version == "1"


async def test_nobody_passes_for_the_gateway(plane: DataPlane, gate: Any) -> None:
    """Headers by which backends know versions and shadows are the gateway's own."""
    await plane.generate("m@1", x_lingqu_model_version="2", x_lingqu_shadow="1", x_lingqu_prefix="1")
    (seen,) = gate[1][0].seen
    assert seen.headers["x-lingqu-model-version"] == "1"
    assert "x-lingqu-shadow" not in seen.headers


async def test_explanations_say_what_envoy_does(plane: DataPlane, gate: Any) -> None:
    cases: list[tuple[str, dict[str, str]]] = [
        ("m@1", {}), ("m@canary", {}), ("m", {"lingqu-version": "2"}), ("m@7", {}), ("m@", {}), ("x", {}),
        ("m@1", {"lingqu-version": "2"}), ("m@away", {}),
    ]  # fmt: skip
    for name, headers in cases:
        found = explain(plane.view, Question("tester", name, headers))
        call = plane.generate(name, **{k.replace("-", "_"): v for k, v in headers.items()})
        if found.refusal is None:
            (choice,) = found.choices
            assert (await call).model_version == str(choice.version)
        else:
            assert (await refusal(call))[:2] == (found.refusal.code, found.refusal.reason)
