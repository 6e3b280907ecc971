"""What releases have to satisfy: patterns and thresholds."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingqu.registry.v1.models_pb2 import ModelVersion, Policy, Threshold
from services.core.errors import BelowThreshold
from services.registry.policies import check_evaluation, matches


@given(st.text("ab*", max_size=8), st.text("ab", max_size=8))
def test_a_star_stands_for_any_text(pattern: str, name: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None
    assert matches(pattern, name) == expected


def test_no_pattern_takes_long() -> None:
    begun = time.monotonic()
    assert not matches("*a" * 32 + "*b", "a" * 64)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("figures", "ok"),
    [
        ({"f1": 0.9}, True),
        ({"f1": 0.89}, False),
        ({}, False),
        ({"f1": float("nan")}, False),
        ({"f1": 1.1}, False),
    ],
)
def test_a_threshold_needs_its_figure(figures: dict[str, float], ok: bool) -> None:
    policy = Policy(thresholds=[Threshold(metric="f1", min=0.9, max=1)])
    version = ModelVersion(model="m", version=1, evaluation=figures)
    if ok:
        check_evaluation(version, policy)
    else:
        with pytest.raises(BelowThreshold, match="f1"):
            check_evaluation(version, policy)
