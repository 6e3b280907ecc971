"""What evidence is worth, what is compared with what, and what comes of it: rules without a service."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.metrics.verdicts import answers
from services.metrics.verdicts.answers import (
    Answer,
    Content,
    Failed,
    Kind,
    Labels,
    Pair,
    Pairs,
    Tokens,
    Vectors,
)
from services.metrics.verdicts.archive import Archive, plain
from services.metrics.verdicts.evidence import EXCESSES, Excess, Mean, Mixture, Tally, log_e
from services.metrics.verdicts.trial import Opinion, Terms, Trial

SHARES = st.floats(0.0, 1.0)


@given(
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    allowed=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99]),
    usual=SHARES,
    part=st.sampled_from(EXCESSES),
    before=SHARES,
    better=SHARES,
)
@settings(max_examples=300)
def test_a_block_is_worth_at_most_one_for_whoever_keeps_to_what_is_allowed(
    n: int, m: int, allowed: float, usual: float, part: float, before: float, better: float
) -> None:
    """Exactly, over all outcomes, however wrong the guess of what is usual was."""
    after = min(1.0, before + allowed) * better
    expected = sum(
        _binomial(i, n, before)
        * _binomial(j, m, after)
        * math.exp(log_e(Tally(n, i), Tally(m, j), usual, allowed, part))
        for i, j in product(range(n + 1), range(m + 1))
    )
    assert expected <= 1 + 1e-6


def _binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=60))
def test_a_mixture_is_the_mean_over_all_beginnings(factors: list[float]) -> None:
    mixture = Mixture.of(1)
    for factor in factors:
        mixture.add([factor])
    capped = [min(factor, math.log(10)) for factor in factors]
    stakes = [0.5, *(0.5 / (n * (n + 1)) for n in range(1, len(factors)))]
    expected = sum(w * math.exp(sum(capped[n:])) for n, w in enumerate(stakes)) + 1 - sum(stakes)
    assert math.exp(mixture.log) == pytest.approx(expected, rel=1e-6)


def test_one_burst_decides_nothing() -> None:
    excess = Excess(0.01, 0.005)
    excess.add(Tally(100_000, 0), Tally(100_000, 100_000))
    assert excess.mixture.log <= math.log(10)


def test_what_goes_wrong_late_is_noticed_too() -> None:
    excess = Excess(0.01, 0.005)
    for _ in range(600):
        excess.add(Tally(90, 0), Tally(10, 0))
    for _ in range(12):
        excess.add(Tally(90, 0), Tally(10, 10))
    assert excess.mixture.log > math.log(500)


def judged(
    trial: Trial, blocks: int, draw: np.random.Generator, *, after: float, slow: float = 1.0
) -> Opinion:
    """Blocks of 45 requests to the old and 5 to the new version, of which 1 % fail and the share `after`."""
    for _ in range(blocks):
        for version, number, share, factor in ((1, 45, 0.01, 1.0), (2, 5, after, slow)):
            for failed, took in zip(draw.random(number) < share, draw.lognormal(0, 0.5, number), strict=True):
                trial.take_request(version, bool(failed), factor * float(took))
        trial.close()
        if trial.opinion()[0] is Opinion.FAIL:
            return Opinion.FAIL
    return trial.opinion()[0]


def test_alarms_without_a_reason_are_as_rare_as_was_asked() -> None:
    """The terms ask for 20 %; a tenth of what can be in the binomial tail would be more than 30 of 100."""
    draw = np.random.default_rng(1)
    terms = Terms(false_alarms=0.2, error_increase=0.0, slowdown=1.0)
    alarms = sum(
        judged(Trial("r", "m", 2, 1, terms), 40, draw, after=0.01) is Opinion.FAIL for _ in range(60)
    )
    assert alarms <= 18


@pytest.mark.parametrize(
    ("after", "slow", "why"),
    [(0.5, 1.0, "requests failed"), (0.01, 3.0, "took more than 1.25 times")],
)
def test_a_version_that_does_worse_fails_and_it_is_said_why(after: float, slow: float, why: str) -> None:
    trial = Trial("r", "m", 2, 1, Terms())
    opinion = judged(trial, 60, np.random.default_rng(2), after=after, slow=slow)
    assert opinion is Opinion.FAIL
    assert why in trial.opinion()[1]
    assert trial.figures()["evidence"] >= 1


def test_a_version_that_does_as_well_passes_once_enough_was_seen() -> None:
    trial = Trial("r", "m", 2, 1, Terms(least=50))
    assert judged(trial, 9, np.random.default_rng(3), after=0.01) is Opinion.NONE
    assert judged(trial, 5, np.random.default_rng(3), after=0.01) is Opinion.PASS
    trial.at(1)
    assert trial.opinion()[0] is Opinion.NONE, "the next step has to be seen anew"


def test_what_is_not_asked_fails_nobody() -> None:
    terms = Terms(error_increase=1.0, slowdown=0.0, label_disagreement=1.0, least=1)
    trial = Trial("r", "m", 2, 1, terms)
    for number in range(50):
        trial.take_pair(pair(number, Kind.LABELS, 1.0))
    assert judged(trial, 20, np.random.default_rng(4), after=1.0, slow=50.0) is Opinion.PASS


def pair(number: int, kind: Kind | None, difference: float | None, failed: bool = False) -> Pair:
    return Pair("m", 2, 1, number, failed, False, kind, difference)


@pytest.mark.parametrize(
    ("kind", "difference"), [(Kind.LABELS, 0.5), (Kind.VECTORS, 0.2), (Kind.TOKENS, 0.95)]
)
def test_answers_that_differ_fail_a_version_and_alike_ones_do_not(kind: Kind, difference: float) -> None:
    good, bad = (Trial("r", "m", 2, 1, Terms(least=40)) for _ in range(2))
    allowed = Terms().difference(kind)
    for number in range(40):
        good.take_pair(pair(number, kind, allowed / 2))
        bad.take_pair(pair(number, kind, difference))
    assert good.opinion()[0] is Opinion.PASS
    assert bad.opinion()[0] is Opinion.FAIL
    assert "in 40 requests that both answered" in bad.opinion()[1]
    figure = bad.figures()[str(kind)]
    assert figure == pytest.approx(difference if kind is Kind.TOKENS else 1 - difference)


def test_the_same_text_again_is_no_new_evidence() -> None:
    trial = Trial("r", "m", 2, 1, Terms())
    for _ in range(1000):
        trial.take_pair(pair(7, Kind.LABELS, 1.0))
    assert trial.opinion()[0] is Opinion.NONE
    assert trial.figures()["compared"] == 1


def test_copies_that_fail_fail_the_version() -> None:
    trial = Trial("r", "m", 2, 1, Terms())
    for number in range(40):
        trial.take_pair(pair(number, None, None, failed=True))
        trial.close()
    opinion, why = trial.opinion()
    assert opinion is Opinion.FAIL
    assert "copied requests failed" in why


def test_what_cannot_be_compared_is_counted_and_judged_by_nobody() -> None:
    trial = Trial("r", "m", 2, 1, Terms())
    for number in range(200):
        trial.take_pair(pair(number, Kind.TOKENS, None))
    trial.close()
    assert trial.opinion()[0] is Opinion.PASS
    assert trial.figures()["incomparable"] == 200


def answer(
    content: Content, request: str = "r", *, copy: bool = False, version: int = 0, number: int = 1
) -> Answer:
    return Answer("m", version or (2 if copy else 1), request, copy, number, content)


def vectors(*rows: list[float]) -> Vectors:
    return Vectors(np.asarray(rows, np.float16))


def tokens(*ids: int, vocabulary: int = 1) -> Tokens:
    return Tokens(np.asarray(ids, "<u2").tobytes(), vocabulary)


@pytest.mark.parametrize(
    ("original", "copy", "difference"),
    [
        (Labels(("a", "b")), Labels(("a", "c")), 0.5),
        (Labels(("a",)), Labels(("a", "b")), None),
        (vectors([1, 0], [0, 2]), vectors([1, 0], [0, 1]), 0.0),
        (vectors([1, 0]), vectors([0, 1]), 1.0),
        (vectors([1, 0]), vectors([-1, 0]), 1.0),
        (vectors([0, 0]), vectors([0, 0]), 0.0),
        (vectors([0, 0]), vectors([1, 0]), 1.0),
        (vectors([6e4, 6e4]), vectors([6e4, 6e4]), 0.0),
        (vectors([math.nan, 1]), vectors([1, 1]), 1.0),
        (vectors([1, 0]), vectors([math.inf, 0]), 1.0),
        (vectors([1, 0]), vectors([1, 0, 0]), None),
        (tokens(1, 2, 3, 4), tokens(1, 2, 9, 4), 0.5),
        (tokens(1, 2), tokens(1, 2, 3, 4), 0.5),
        (tokens(), tokens(), 0.0),
        (tokens(1), tokens(1, vocabulary=2), None),
        (Labels(("a",)), tokens(1), None),
        (Labels(("a",)), Failed(), None),
    ],
)
def test_how_far_two_answers_are_apart(original: Content, copy: Content, difference: float | None) -> None:
    for first, second in (
        (answer(original), answer(copy, copy=True)),
        (answer(copy, copy=True), answer(original)),
    ):
        pairs = Pairs()
        assert pairs.take(first, 0.0) is None
        found = pairs.take(second, 1.0)
        assert found is not None
        assert found.difference == (None if difference is None else pytest.approx(difference, abs=1e-3))
        assert found.failed == isinstance(copy, Failed)
        assert (found.version, found.before) == (2, 1)


def test_a_version_is_not_compared_with_itself_nor_with_strangers() -> None:
    pairs = Pairs()
    pairs.take(answer(Labels(("a",)), version=2), 0.0)
    assert pairs.take(answer(Labels(("b",)), copy=True), 0.0) is None
    pairs.take(answer(Labels(("a",)), "one"), 0.0)
    assert pairs.take(answer(Labels(("b",)), "other", copy=True), 0.0) is None


def test_answers_that_wait_are_bounded_in_time_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs()
    pairs.take(answer(Labels(("a",)), "old"), 0.0)
    assert pairs.take(answer(Labels(("a",)), "old", copy=True), answers.MAX_WAIT_S + 1) is None
    assert pairs.dropped == 1
    monkeypatch.setattr(answers, "MAX_WAITING", 3)
    for number in range(10):
        pairs.take(answer(Labels(("a",)), f"n{number}"), 200.0)
    assert pairs.take(answer(Labels(("a",)), "n0", copy=True), 200.0) is None
    assert pairs.take(answer(Labels(("a",)), "n9", copy=True), 200.0) is not None
    monkeypatch.setattr(answers, "MAX_WAITING", 1000)
    monkeypatch.setattr(answers, "MAX_WAITING_BYTES", 10_000)
    for number in range(100):
        pairs.take(answer(Vectors(np.zeros((1, 400), np.float16)), f"v{number}"), 200.0)
    assert sum(one.bytes for one, _ in pairs._waiting.values()) <= 10_000


def test_a_mean_beyond_what_is_allowed_is_evidence_and_one_within_is_not() -> None:
    draw = np.random.default_rng(5)
    within, beyond = Mean(0.02), Mean(0.02)
    for value in draw.random(500):
        within.add(float(value < 0.01))
        beyond.add(float(value < 0.2))
    assert within.mixture.log < 0
    assert beyond.mixture.log > math.log(500)


def test_a_trial_outlives_a_restart(tmp_path: Path) -> None:
    trial = Trial("r", "m", 2, 1, Terms(slowdown=1.5))
    judged(trial, 10, np.random.default_rng(6), after=0.1)
    trial.take_pair(pair(1, Kind.VECTORS, 0.3))
    trial.take_pair(pair(2, Kind.LABELS, None))
    archive = Archive(tmp_path / "verdicts.json")
    archive.keep([plain(trial)])
    (found,) = Archive(tmp_path / "verdicts.json").read().values()
    assert plain(found) == json.loads(json.dumps(plain(trial)))
    assert found.figures() == trial.figures()
    assert found.terms == trial.terms


@pytest.mark.parametrize("body", [b"{", b"[1]", b'[{"rollout": "r"}]', b"\xff", b"{}", b"null"])
def test_a_file_that_cannot_be_read_is_set_aside(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "verdicts.json"
    path.write_bytes(body)
    assert Archive(path).read() == {}
    assert path.exists() == (body == b"{}")
