"""What is told of a model's parameters, against plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import distributions
from pipeline.distributions import OTHERS, distribution, layers

values = st.lists(
    st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, math.nan, math.inf, -math.inf]), max_size=40
)


@given(st.lists(values, max_size=4), st.sampled_from([1, 3, distributions.CHUNK]))
def test_numbers_are_those_of_all_values_together(lists: list[list[float]], chunk: int) -> None:
    before, distributions.CHUNK = distributions.CHUNK, chunk
    try:
        found = distribution([torch.tensor(some, dtype=torch.float32) for some in lists])
    finally:
        distributions.CHUNK = before
    every = np.array([value for some in lists for value in some], dtype="float64")
    if not every.size:
        assert found == {}
        return
    finite = every[np.isfinite(every)]
    assert found["zeros"] == pytest.approx((every == 0).mean())
    assert found["nans"] == pytest.approx(1 - finite.size / every.size)
    if not finite.size:
        assert found.keys() == {"zeros", "nans"}
        return
    expected = {"mean": finite.mean(), "std": finite.std(), "min": finite.min(), "max": finite.max()}
    scale = max(1.0, np.abs(finite).max())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5 * scale), name
    for name, share in distributions.QUANTILES.items():
        assert found[name] == pytest.approx(np.quantile(finite, share), rel=1e-4, abs=1e-4 * scale), name


def test_quantiles_of_large_layers_are_of_a_sample() -> None:
    torch.manual_seed(1)
    found = distribution([torch.randn(500_000), torch.randn(500_000).to(torch.bfloat16) + 1])
    assert found["mean"] == pytest.approx(0.5, abs=0.01)
    assert found["p50"] == pytest.approx(0.5, abs=0.05)
    assert found["p99"] == pytest.approx(3.06, abs=0.2)


def test_layers_are_bounded_by_joining_names() -> None:
    names = [f"blocks.{n}.{part}.weight" for n in range(10) for part in ("attention", "mlp")]
    parameters = [(name, torch.zeros(1)) for name in names]
    assert list(layers(parameters, 20)) == names
    joined = layers(parameters, 10)
    assert list(joined) == [f"blocks.{n}" for n in range(10)]
    assert all(len(tensors) == 2 for tensors in joined.values())
    flat = layers([(f"w{n}", torch.zeros(1)) for n in range(300)], 4)
    assert list(flat) == ["w0", "w1", "w2", OTHERS]
    assert sum(map(len, flat.values())) == 300
    assert layers([]) == {}
