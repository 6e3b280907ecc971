"""Who is told what: nothing twice, nothing forgotten, whatever happens in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.metrics.alerts.notices import SECOND, Group, Notice, Timing, delivered, due, fingerprint
from services.metrics.alerts.silences import Silence, silenced_by
from services.metrics.points import Labels, labels

TIMING = Timing(wait_s=5, interval_s=60, repeat_s=3600)
START = 1_790_000_000 * SECOND
NAMES = ("a", "b", "c")


def notice(name: str, starts_ns: int) -> Notice:
    return Notice(labels({"alertname": "r", "model": name}), "", 1.0, starts_ns)


# What fires (and which firing it is), what is silenced, seconds that pass, whether the receiver answers.
worlds = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3)),
        st.sets(st.sampled_from(NAMES)),
        st.floats(0, 200),
        st.booleans(),
    ),
    max_size=50,
)


@given(worlds)
def test_receivers_are_told_each_firing_once_and_each_end(
    world: list[tuple[dict[str, int], set[str], float, bool]],
) -> None:
    group, now = Group(), START
    believed: dict[str, int] = {}  # by receivers: what fires, and which firing it is
    sent: list[int] = []
    for fires, quiet, after_s, answers in world:
        now += int(after_s * SECOND)
        found = {(n := notice(name, number)).fingerprint: n for name, number in fires.items()}
        silenced = {key: n for key, n in found.items() if dict(n.labels)["model"] in quiet}
        firing = {key: n for key, n in found.items() if key not in silenced}
        group, notification = due("r", group, firing, silenced, now, TIMING)
        if notification is None:
            continue
        assert not sent or now - sent[-1] >= 0
        ended = {n.fingerprint for n in notification.resolved}
        news = {n.fingerprint for n in notification.firing if believed.get(n.fingerprint) != n.starts_ns}
        assert ended <= set(believed), "nobody is told the end of what they were not told"
        assert not ended & set(found), "what still fires has not ended"
        assert {n.fingerprint for n in notification.firing} == set(firing)
        if not news and not ended:
            assert now - sent[-1] >= TIMING.repeat_s * SECOND, "nothing is repeated early"
        if not answers:
            continue
        if believed:
            assert now - sent[-1] >= TIMING.interval_s * SECOND
        for key in ended:
            del believed[key]
        believed |= {n.fingerprint: n.starts_ns for n in notification.firing}
        group = delivered(group, notification, now)
        sent.append(now)
        assert {key: n.starts_ns for key, n in group.told.items()} == believed
    # At the end nothing fires any more, and whoever was told so learns it.
    for _ in range(2):
        now += 61 * SECOND
        group, notification = due("r", group, {}, {}, now, TIMING)
        if notification is not None:
            assert {n.fingerprint for n in notification.resolved} == set(believed)
            group, believed = delivered(group, notification, now), {}
    assert not believed
    assert not group.told


def test_what_starts_together_is_told_together() -> None:
    one, two = notice("a", START), notice("b", START)
    group, nothing = due("r", Group(), {one.fingerprint: one}, {}, START, TIMING)
    assert nothing is None
    both = {one.fingerprint: one, two.fingerprint: two}
    group, nothing = due("r", group, both, {}, START + 4 * SECOND, TIMING)
    assert nothing is None
    group, told = due("r", group, both, {}, START + 5 * SECOND, TIMING)
    assert told is not None
    assert len(told.firing) == 2


def test_what_ended_before_it_was_told_is_never_told() -> None:
    one = notice("a", START)
    group, _ = due("r", Group(), {one.fingerprint: one}, {}, START, TIMING)
    group, told = due("r", group, {}, {}, START + 10 * SECOND, TIMING)
    assert told is None
    assert group == Group()


def test_a_clock_that_was_set_back_delays_by_one_interval_at_most() -> None:
    one, two = notice("a", START), notice("b", START)
    group = Group({one.fingerprint: one}, sent_ns=START)
    back, now = {one.fingerprint: one, two.fingerprint: two}, START - 10**6 * SECOND
    group, told = due("r", group, back, {}, now, TIMING)
    assert told is None
    _, told = due("r", group, back, {}, now + 60 * SECOND, TIMING)
    assert told is not None


def test_a_silence_fits_all_its_matchers_until_its_time() -> None:
    def quiet(now: int, **found: str) -> bool:
        silence = Silence("s", (("alertname", "queue-*"), ("model", "")), START, "me", "why", 0)
        return silenced_by(found, [silence], now) == ("s",)

    assert quiet(START - 1, alertname="queue-growing")
    assert not quiet(START, alertname="queue-growing")
    assert not quiet(START - 1, alertname="queue-growing", model="a")
    assert not quiet(START - 1, alertname="other")


def test_fingerprints_are_those_of_prometheus() -> None:
    # From the documented algorithm over its own test's empty set (model/signature_test.go).
    assert fingerprint(()) == "cbf29ce484222325"
    assert int(fingerprint(labels({"first-label": "first-label-value", "second-label": "x"})), 16) < 1 << 64
    pairs: list[Labels] = [(("a", "bc"),), (("ab", "c"),), (("a", "b"), ("c", "")), (("a", "bc"), ("d", "e"))]
    assert len({fingerprint(found) for found in pairs}) == len(pairs)
