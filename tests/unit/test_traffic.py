"""What releases and rollbacks make of a model's traffic, against a plain stack."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingqu.registry.v1 import models_pb2 as pb
from services.core.errors import NothingToRollBack
from services.registry import traffic

OPS = st.one_of(
    st.tuples(st.just("promote"), st.integers(1, 5)),
    st.tuples(st.just("split"), st.integers(1, 99)),
    st.tuples(st.just("canary"), st.integers(1, 99)),
    st.tuples(st.just("name"), st.integers(0, 5)),
    st.tuples(st.just("back"), st.just(0)),
)


def shares(model: pb.Model) -> dict[int, int]:
    return {w.version: w.percent for w in model.traffic.weights}


@given(st.lists(OPS, max_size=30))
def test_a_rollback_is_the_way_back_of_a_stack(operations: list[tuple[str, int]]) -> None:
    model = pb.Model(name="m")
    history: dict[int, pb.Release] = {}
    stack: list[dict[int, int]] = [{}]  # the top is the traffic now

    def released(state: pb.Model) -> None:
        nonlocal model
        assert state.last_release == model.last_release + 1
        history[state.last_release] = pb.Release(
            previous_traffic=state.previous_traffic, previous_release=state.previous_release
        )
        state.name = "m"
        model = state

    for operation, number in operations:
        match operation:
            case "promote":
                released(traffic.forward(model, traffic.all_to(model, number)))
                stack.append({number: 100})
            case "split":
                weights = {1: number, 2: 100 - number}
                released(traffic.forward(model, traffic.split(model, weights, 0)))
                stack.append(weights)
            case "canary" if len(stack) > 1:  # a later step belongs to the release before
                released(traffic.onward(model, traffic.canary(model, 1, 2, number)))
                stack[-1] = {1: 100 - number, 2: number}
            case "name":
                released(traffic.aside(model, traffic.named(model, "mine", number)))
            case "back" if len(stack) > 2:
                released(traffic.back(model, history.get))
                stack.pop()
            case "back":
                with pytest.raises(NothingToRollBack):
                    traffic.back(model, history.get)
        assert shares(model) == stack[-1]
        assert sum(shares(model).values()) in (0, 100)


def test_names_that_people_gave_outlive_a_rollback() -> None:
    model = traffic.forward(pb.Model(name="m"), traffic.all_to(pb.Model(), 1))
    model = traffic.forward(model, traffic.all_to(model, 2))
    model = traffic.aside(model, traffic.named(model, "mine", 2))
    model = traffic.back(model, {1: pb.Release()}.get)
    assert dict(model.traffic.aliases) == {"stable": 1, "mine": 2}


def test_a_promotion_ends_canary_and_shadow() -> None:
    model = traffic.forward(pb.Model(), traffic.all_to(pb.Model(), 1))
    model = traffic.forward(model, traffic.canary(model, 1, 2, 10))
    assert dict(model.traffic.aliases) == {"stable": 1, "canary": 2}
    done = traffic.all_to(model, 2)
    assert dict(done.aliases) == {"stable": 2}
    assert traffic.serving(done) == {2}


def test_the_main_version_has_the_largest_share() -> None:
    assert traffic.main_version(pb.Traffic()) == 0
    assert traffic.main_version(traffic.split(pb.Model(), {1: 90, 2: 10}, 3)) == 1
    assert traffic.main_version(traffic.split(pb.Model(), {1: 50, 2: 50}, 0)) == 2
