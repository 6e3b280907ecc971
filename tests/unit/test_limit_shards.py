"""One shard of limits and its successors, by clocks that the test moves."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.access import RATES, Access, Client, Limits, SharedLimits
from services.gateway.limits.cells import HANDOVER
from services.gateway.limits.clock import SKEW_MS, Moment
from services.gateway.limits.rules import MINUTE, SECOND, TOKEN_DAY, TOKEN_MINUTE, Rule, Rules, limited
from services.gateway.limits.shard import Shard

START = 1_800_000_000_000


class Ledger:
    """What was written, as the registry keeps it."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def write(self, shard: Shard, now: Moment) -> None:
        writes = shard.due(now)
        self.entries |= {name: value for name, (value, _) in writes.entries.items()}
        for name in writes.forget:
            self.entries.pop(name)
        shard.written(writes, now)

    def hand_over(self, shard: Shard, now: Moment) -> None:
        self.entries |= {name: value for name, (value, _) in shard.farewell(now).entries.items()}

    def taken(self) -> dict[str, bytes]:
        """All of it; the mark of a handing over is forgotten."""
        found = dict(self.entries)
        self.entries.pop(HANDOVER, None)
        return found


def rule(**limits: int) -> tuple[Rule, ...]:
    kinds = {kind.field: kind for kind in (SECOND, MINUTE, TOKEN_MINUTE, TOKEN_DAY)}
    return (Rule("c/alice", tuple((kinds[field], limit) for field, limit in limits.items())),)


def at(ms: int, skew: int = 0) -> Moment:
    return Moment(ms, START + ms + skew)


def fresh(entries: Mapping[str, bytes] | None = None) -> Shard:
    return Shard("a", entries if entries is not None else {HANDOVER: b""}, at(0))


def test_requests_per_second_need_no_ledger_and_say_how_long_to_wait() -> None:
    shard, rules = fresh(), rule(requests_per_second=3)
    verdicts = [shard.decide(rules, at(ms)) for ms in (100, 150, 200, 250)]
    assert [v.remaining for v in verdicts if v] == [2, 1, 0, 0]
    refused = verdicts[-1]
    assert refused is not None
    assert not refused.admitted
    assert (refused.limit, refused.window_ms) == (3, 1_000)
    assert 850 <= refused.wait_ms <= 852
    assert not shard.due(at(250))
    after = shard.decide(rules, at(250 + refused.wait_ms))
    assert after is not None
    assert after.admitted


def test_requests_per_minute_wait_for_the_ledger_and_then_no_more() -> None:
    shard, ledger, rules = fresh(), Ledger(), rule(requests_per_minute=600)
    assert shard.decide(rules, at(0)) is None
    assert shard.urgent
    ledger.write(shard, at(1))
    waited, passed = 0, 0
    for ms in range(2, 5_000, 10):  # a hundred a second
        while (verdict := shard.decide(rules, at(ms))) is None:
            waited += 1
            ledger.write(shard, at(ms))
        passed += bool(verdict.admitted)
        if ms % 250 == 2:
            ledger.write(shard, at(ms))
    assert passed == 500
    assert waited <= 8, "steady traffic is written ahead"


def test_a_successor_without_handover_keeps_the_second_closed() -> None:
    shard, rules = Shard("b", {}, at(0)), rule(requests_per_second=3)
    early, later = shard.decide(rules, at(999)), shard.decide(rules, at(1_000))
    assert early is not None
    assert (early.admitted, early.wait_ms) == (0, 1)
    assert later is not None
    assert later.admitted


def test_a_handover_says_what_the_last_second_has_used() -> None:
    shard, ledger, rules = fresh(), Ledger(), rule(requests_per_second=3)
    for ms in (10, 20):
        shard.decide(rules, at(ms))
    ledger.hand_over(shard, at(30))
    successor = Shard("b", ledger.taken(), at(40))
    verdicts = [successor.decide(rules, at(ms)) for ms in (41, 42, 43)]
    assert [bool(v and v.admitted) for v in verdicts] == [True, False, False]
    assert HANDOVER not in ledger.entries


kinds_of_end = st.sampled_from(["killed", "handed over"])
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "burst", "write", "wait", "long wait", "change"]),
        st.integers(0, 900),
        kinds_of_end,
        st.integers(-SKEW_MS // 2, SKEW_MS // 2),
    ),
    max_size=120,
)


@given(steps, st.integers(1, 40))
def test_no_minute_has_more_than_the_limit_however_owners_change(
    done: list[tuple[str, int, str, int]], limit: int
) -> None:
    """Owners are killed at any moment or hand over; their clocks differ by up to what is assumed; a write
    may be on record without its owner knowing."""
    rules, ledger = rule(requests_per_minute=limit, requests_per_second=max(1, limit // 2)), Ledger()
    shard, now, skew, passed, tenure = Shard("0", {}, at(0)), 0, 0, [], 0

    def ask() -> None:
        verdict = shard.decide(rules, at(now, skew))
        if verdict is None:
            ledger.write(shard, at(now, skew))
            verdict = shard.decide(rules, at(now, skew))
        if verdict is not None and verdict.admitted:
            passed.append(now)

    for step, ms, end, other_skew in done:
        now += ms % 50
        match step:
            case "ask":
                ask()
            case "burst":
                for _ in range(10):
                    ask()
            case "write":
                ledger.write(shard, at(now, skew))
            case "wait":
                now += ms
            case "long wait":
                now += ms * 30
            case "change":
                if end == "handed over":
                    ledger.hand_over(shard, at(now, skew))
                elif ms % 2:  # written, and the answer lost
                    ledger.entries |= {n: v for n, (v, _) in shard.due(at(now, skew)).entries.items()}
                skew, tenure = other_skew, tenure + 1
                shard = Shard(str(tenure), ledger.taken(), at(now, skew))
    for length, most in ((60_000, limit), (1_000, max(1, limit // 2))):
        for first in passed:
            assert sum(first <= other < first + length for other in passed) <= most


def test_what_was_reserved_and_not_used_is_given_back() -> None:
    shard, ledger, rules = fresh(), Ledger(), rule(requests_per_minute=6_000)
    assert shard.decide(rules, at(0)) is None
    ledger.write(shard, at(1))  # a hundred, of which one is used
    assert shard.decide(rules, at(2)) is not None
    for ms in (600, 1_600, 2_600, 3_600):
        ledger.write(shard, at(ms))
    successor = Shard("b", ledger.taken(), at(4_000))
    while (verdict := successor.decide(rules, at(5_500))) is None:
        ledger.write(successor, at(5_500))
    assert verdict.remaining >= 6_000 - 1 - 2


def test_tokens_are_charged_once_and_on_record_before_that_is_said() -> None:
    shard, ledger, rules = fresh(), Ledger(), rule(tokens_per_minute=100, tokens_per_day=1_000)
    assert not shard.charge("r", 1, {"c/alice": 60}, at(0))
    assert not shard.charge("r", 1, {"c/alice": 60}, at(1))
    ledger.write(shard, at(2))
    assert shard.charge("r", 1, {"c/alice": 60}, at(3))
    verdict = shard.decide(rules, at(4))
    assert verdict is not None
    assert (verdict.admitted, verdict.remaining, verdict.tokens) == (4, 40, True)
    assert not shard.charge("r", 2, {"c/alice": 50}, at(5))
    verdict = shard.decide(rules, at(6))
    assert verdict is not None
    assert not verdict.admitted
    ledger.write(shard, at(7))
    successor = Shard("b", ledger.taken(), at(10))
    assert successor.charge("r", 2, {"c/alice": 50}, at(11)), "it is on record"
    verdict = successor.decide(rules, at(12))
    assert verdict is not None
    assert not verdict.admitted


def test_a_charge_that_others_follow_is_still_acknowledged() -> None:
    shard, ledger = fresh(), Ledger()
    shard.charge("r", 1, {"c/alice": 1}, at(0))
    writes = shard.due(at(1))
    shard.charge("s", 1, {"c/alice": 1}, at(2))  # while it is being written
    shard.written(writes, at(3))
    assert shard.charge("r", 1, {"c/alice": 1}, at(4))
    assert not shard.charge("s", 1, {"c/alice": 1}, at(5))
    ledger.write(shard, at(6))
    assert shard.charge("s", 1, {"c/alice": 1}, at(7))


def test_tokens_of_a_day_are_put_together_and_all_of_them_count() -> None:
    shard, ledger, rules = fresh(), Ledger(), rule(tokens_per_day=10**9)
    for minute in range(60):
        shard.charge("r", minute, {"c/alice": 7}, at(minute * 60_000))
        ledger.write(shard, at(minute * 60_000 + 1))
        ledger.write(shard, at(minute * 60_000 + 2))
    assert len(ledger.entries) < 25
    successor = Shard("b", ledger.taken(), at(3_600_000))
    verdict = successor.decide(rules, at(3_600_001))
    assert verdict is not None
    assert verdict.remaining == 10**9 - 7 * 60
    verdict = successor.decide(rules, at(86_400_000 + 3_600_000 + 320_000))
    assert verdict is not None
    assert verdict.remaining == 10**9


def test_a_request_that_another_limit_refused_does_not_count() -> None:
    shard, rules = fresh(), rule(requests_per_second=1)
    first = shard.decide(rules, at(10))
    assert first is not None
    shard.take_back(rules, first.admitted)
    second = shard.decide(rules, at(20))
    assert second is not None
    assert second.admitted


@pytest.mark.parametrize("model", ["", "other"])
def test_only_what_is_global_is_asked_for(model: str) -> None:
    local = Limits(requests_per_second=1, concurrent_requests=5, local=RATES)
    access = Access(
        (
            Client("local", limits=local),
            Client("mixed", limits=Limits(requests_per_second=1, tokens_per_day=5, local=RATES)),
            Client("apart", limits=Limits(3, 60, local=frozenset({"requests_per_second"}))),
            Client("own", model_limits=(("smol*", Limits(requests_per_second=3)), ("*", local))),
        ),
        shared=(SharedLimits("llama", Limits(requests_per_minute=9)), SharedLimits("x", local)),
    )
    assert limited(access) == (("mixed", "apart", "own"), ("llama",))
    rules = Rules(access)
    assert rules.of("local", model) == (None, None)
    assert rules.of("own", model) == (None, None)
    assert rules.of("nobody", "x") == (None, None)
    mixed, _ = rules.of("mixed", model)
    assert mixed is not None
    assert mixed.rules == (Rule("c/mixed", ((TOKEN_DAY, 5),)),)
    apart, _ = rules.of("apart", model)
    assert apart is not None
    assert apart.rules == (Rule("c/apart", ((MINUTE, 60),)),)
    own, shared = rules.of("own", "smollm")
    assert own is not None
    assert [r.key for r in own.rules] == ["c/own/smollm"]
    assert shared is None
    assert rules.of("x", "llama")[1] is not None
