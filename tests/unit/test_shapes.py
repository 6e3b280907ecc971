"""What is done with vectors and logits behind the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.inference.classifier import probabilities
from services.inference.vectors import shaped

VECTORS = np.array([[3, 4, 0, 12], [0, 0, 0, 5]], np.float32)
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("dimensions", "normalize", "normalized", "expected"),
    [
        (None, None, True, UNIT),  # what the model gives
        (2, None, True, [[0.6, 0.8], [0, 0]]),  # of unit length again, but where nothing is left
        (2, False, True, UNIT[:, :2]),
        (None, False, True, UNIT),
        (2, True, True, [[0.6, 0.8], [0, 0]]),
    ],
)
def test_vectors_of_a_model_that_normalises(
    dimensions: int | None, normalize: bool | None, normalized: bool, expected: object
) -> None:
    assert np.allclose(shaped(UNIT, dimensions, normalize, normalized), expected, atol=1e-6)


def test_vectors_of_a_model_that_does_not() -> None:
    assert np.array_equal(shaped(VECTORS, None, None, False), VECTORS)
    assert np.array_equal(shaped(VECTORS, 2, None, False), VECTORS[:, :2])
    assert np.allclose(np.linalg.norm(shaped(VECTORS, 4, True, False), axis=1), 1)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_probabilities_are_torchs(logits: list[float]) -> None:
    row = torch.tensor([logits])
    assert np.allclose(probabilities(row.numpy(), False), torch.softmax(row, 1).numpy(), atol=1e-6)
    assert np.allclose(probabilities(row.numpy(), True), torch.sigmoid(row).numpy(), atol=1e-6)
