"""Which limits Envoy is told, and what changes them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.core.access import RATES, Access, Client, Limits, RevokedKey, SharedLimits
from services.core.discovery import Model
from services.gateway.filters.local_limits import limits_of, local_limits
from services.gateway.view import View

MODELS = (Model("a", ()), Model("b", ()))
rates = st.integers(0, 3)
limits = st.builds(Limits, rates, rates, rates, rates, rates, st.frozensets(st.sampled_from(sorted(RATES))))
patterns = st.sampled_from(["*", "a", "b", "a*", "c"])
clients = st.builds(
    Client,
    st.sampled_from(["one", "two"]),
    st.lists(patterns, max_size=2).map(tuple),
    limits,
    st.lists(st.tuples(patterns, limits), max_size=3).map(tuple),
)


def told(access: Access, models: tuple[Model, ...] = MODELS) -> list[dict[str, Any]]:
    return local_limits(View((), (), (), models, access))


def kinds(made: Any) -> list[str]:
    return [part for part in json.dumps(made).split('"') if part in ("at-once", "requests_per_second")]


@given(clients)
def test_a_filter_for_each_limit_that_is_local(client: Client) -> None:
    found = kinds(told(Access((client,))))
    able = [m.name for m in MODELS if any(p in ("*", m.name, f"{m.name}*") for p in client.models)]
    counted = [client.limits, *(limits_of(client, name) for name in able)]
    assert found.count("at-once") == sum(bool(of.concurrent_requests) for of in counted)
    assert found.count("requests_per_second") == sum(
        "requests_per_second" in of.local and of.requests_per_second > 0 for of in counted
    )


@given(clients)
def test_what_is_no_local_limit_begins_no_count_anew(client: Client) -> None:
    """Tokens, limits counted together, revoked keys, and clients without limits."""
    before = told(Access((client,)))
    globally = Limits(5, 50, tokens_per_day=7)
    others = (Client("free", ("*",)), Client("global", ("*",), globally, (("*", globally),)), client)
    shared = (SharedLimits("a", globally),)
    assert told(Access(others, (RevokedKey("k"),), shared)) == before


def test_the_first_entry_that_fits_counts() -> None:
    client = Client("c", ("*",), model_limits=(("a", Limits(1)), ("*", Limits(2)), ("b", Limits(3))))
    assert [limits_of(client, name).requests_per_second for name in ("a", "b", "c")] == [1, 2, 2]


def test_without_limits_there_is_nothing_to_look_up() -> None:
    assert not any("xds_matcher" in made["typed_config"] for made in told(Access()))
