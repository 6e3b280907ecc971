"""Explanations follow the same rules as routes; refusals have the same reasons."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.access import Access, Client, Limits, SharedLimits
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway.explain import Question, explain
from services.gateway.view import View, view

AT = {"grpc": "10.0.0.1:1", "oip": "10.0.0.1:2", "http": "10.0.0.1:3"}


def seen(weights: dict[int, int], ready: set[int], access: Access | None = None, **more: object) -> View:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "generate", "x") for n in range(1, 5))
    model = Model("m", versions, tuple(weights.items()), **more)  # type: ignore[arg-type]
    hosted = tuple(Hosted(VersionKey("m", n), READY) for n in sorted(ready))
    return view([Replica("r", "inference", AT, hosted)], [model], access)


@given(st.sets(st.integers(1, 4)), st.sampled_from([{1: 100}, {1: 70, 2: 30}, {1: 50, 2: 30, 3: 20}]))
def test_probabilities_are_the_shares_of_those_that_can_answer(
    ready: set[int], weights: dict[int, int]
) -> None:
    found = explain(seen(weights, ready), Question("c", "m"))
    able = {v: p for v, p in weights.items() if v in ready} or weights
    total = sum(able.values())
    assert {c.version: c.probability for c in found.choices} == pytest.approx(
        {v: p / total for v, p in able.items()}
    )
    assert (found.refusal is None) == bool(weights.keys() & ready)
    assert ("no replica has version" in found.rule) == (0 < len(able) < len(weights))


@pytest.mark.parametrize(
    ("question", "version"),
    [
        (Question("c", "m@3"), 3),
        (Question("c", "m@canary"), 3),
        (Question("c", "m", {"Lingqu-Version": "2"}), 2),
        (Question("c", "m", kind="tensor", version="2"), 2),
        (Question("c", "m@2", {"lingqu-version": "2"}, "tensor", "2"), 2),
    ],
)
def test_who_asks_for_a_version_gets_it(question: Question, version: int) -> None:
    found = explain(seen({1: 100}, {1, 2, 3}, aliases={"canary": 3}), question)
    (choice,) = found.choices
    assert (choice.version, choice.probability) == (version, 1)
    assert choice.cluster == f"{question.kind}/m/{version}"
    assert str(version) in found.rule
    assert found.refusal is None


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (Question("c", "n"), "MODEL_NOT_FOUND"),
        (Question("c", "m@4"), "VERSION_NOT_SERVED"),
        (Question("c", "m@nightly"), "VERSION_NOT_SERVED"),
        (Question("c", "m@1", {"lingqu-version": "2"}), "INVALID_ARGUMENT"),
        (Question("c", "m@"), "INVALID_ARGUMENT"),
        (Question("c", "!"), "INVALID_ARGUMENT"),
        (Question("narrow", "m"), "MODEL_NOT_ALLOWED"),
        (Question("off", "m"), "CLIENT_DISABLED"),
    ],
)
def test_a_refusal_is_explained_by_its_reason(question: Question, reason: str) -> None:
    access = Access((Client("narrow", ("other-*",)), Client("off", ("*",), disabled=True)))
    found = explain(seen({1: 100}, {1, 2}, access), question)
    assert found.refusal is not None
    assert found.refusal.reason == reason
    assert not found.choices


def test_shadows_limits_and_balancing_are_told() -> None:
    limits = Limits(5, 50, tokens_per_day=1_000, local=frozenset({"requests_per_minute"}))
    access = Access((Client("c", ("*",), limits, (("m*", Limits(concurrent_requests=2)),)),))
    access = Access(access.clients, (), (SharedLimits("m", Limits(requests_per_minute=9)),))
    shown = seen({1: 100}, {1, 2}, access, shadow=2, shadow_percent=20)
    found = explain(shown, Question("c", "m", {"lingqu-session": "s"}))
    assert found.copies is not None
    assert (found.copies.cluster, found.copies.probability) == ("shadow/text/m/2", 0.2)
    assert "session" in found.balancing
    assert found.limits == (
        'client "c" of model "m": 2 concurrent requests (each gateway for itself)',
        'client "c": 5 requests per second (all gateways together)',
        'client "c": 50 requests per minute (each gateway for itself)',
        'client "c": 1,000 tokens per day (all gateways together)',
        'model "m": 9 requests per minute (all gateways together)',
    )
    assert "beginning" in explain(shown, Question("c", "m")).balancing
    assert "fewest" in explain(shown, Question("c", "m", kind="tensor")).balancing
    assert explain(shown, Question("c", "m@1")).copies is None
