"""Allow-lists as Envoy's matcher: the same names as everywhere else, and changes that cost little."""

from __future__ import annotations

import re
import time

from hypothesis import given
from hypothesis import strategies as st

from services.core.access import Access, Client, RevokedKey
from services.core.patterns import matches
from services.gateway import xds
from services.gateway.filters.access import covering
from services.gateway.listener import Entry
from services.gateway.snapshot import Builder, snapshot
from services.gateway.view import view

ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []})

patterns = st.lists(st.text("ab.-*", min_size=1, max_size=8), min_size=1, max_size=4)
names = st.text("ab.-", min_size=1, max_size=8)


@given(patterns, names)
def test_an_expression_covers_what_the_patterns_cover(wanted: list[str], name: str) -> None:
    expression = re.compile(covering(tuple(wanted)))
    covers = any(matches(pattern, name) for pattern in wanted)
    for state in (name, f'["{name}"]'):  # out of JSON, and out of a message
        assert bool(expression.fullmatch(state)) == covers


@given(patterns, st.lists(names, min_size=2, max_size=3))
def test_a_message_with_several_names_is_none_of_them(wanted: list[str], several: list[str]) -> None:
    state = "[" + ",".join(f'"{name}"' for name in several) + "]"
    assert not re.fullmatch(covering(tuple(wanted)), state)


def test_one_more_key_among_a_thousand_clients_costs_little() -> None:
    clients = tuple(Client(f"c{n}", tuple(f"m{n}-{k}" for k in range(50))) for n in range(1_000))
    builder = Builder()
    times = [time.process_time()]
    for count in range(3):
        access = Access(clients, tuple(RevokedKey(f"k{n}") for n in range(count)))
        made = builder.build(view([], [], access), ENTRY)
        times.append(time.process_time())
    assert times[3] - times[2] < 0.4 * (times[1] - times[0])
    whole = snapshot(view([], [], access), ENTRY)
    assert made.found[xds.EXTENSIONS]["access"] == whole.found[xds.EXTENSIONS]["access"]
    assert len(made.found[xds.EXTENSIONS]["access"].packed) < 3_000_000
