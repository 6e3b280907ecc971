"""Every runtime of encoders computes the same, and what it cannot read it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.bundled import VECTOR_MODEL
from services.inference.runtimes import EncoderRuntime, UnknownRuntime, open_encoder

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def opened(artifacts: dict[str, Path]) -> dict[str, EncoderRuntime]:
    graph = artifacts[VECTOR_MODEL] / "model.onnx"
    return {name: open_encoder(name, graph, ("embedding",), 2) for name in RUNTIMES}


@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (7, 33), (16, 8)])
def test_all_compute_the_same_for_any_shape(
    opened: dict[str, EncoderRuntime], shape: tuple[int, int]
) -> None:
    ids = np.random.default_rng(7).integers(1000, 30000, shape, np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    one, other = (opened[name].run(inputs)["embedding"] for name in RUNTIMES)
    assert one.shape == other.shape == (shape[0], 384)
    assert float(np.min(np.sum(one * other, axis=1))) >= 0.99999


def test_results_stay_when_the_next_run_begins(opened: dict[str, EncoderRuntime]) -> None:
    for runtime in opened.values():
        ones, twos = (np.full((2, 4), token, np.int64) for token in (2000, 3000))
        first = runtime.run({"input_ids": ones, "attention_mask": np.ones_like(ones)})["embedding"]
        kept = first.copy()
        runtime.run({"input_ids": twos, "attention_mask": np.ones_like(twos)})
        assert np.array_equal(first, kept)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_that_is_no_graph_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(Exception, match=r"m\.onnx|[Pp]rotobuf|model"):
        open_encoder(name, tmp_path / "m.onnx", ("embedding",))


@pytest.mark.parametrize("name", RUNTIMES)
def test_inputs_that_do_not_fit_raise_and_harm_nothing(opened: dict[str, EncoderRuntime], name: str) -> None:
    ids = np.ones((1, 4), np.int64)
    good = {"input_ids": ids, "attention_mask": ids}
    with pytest.raises(Exception):  # noqa: B017, PT011 - each runtime has errors of its own
        opened[name].run({"input_ids": ids, "attention_mask": np.ones((1, 5), np.int64)})
    assert opened[name].run(good)["embedding"].shape == (1, 384)


def test_what_nobody_runs_here_is_called_so(artifacts: dict[str, Path]) -> None:
    with pytest.raises(UnknownRuntime, match="tensorrt"):
        open_encoder("tensorrt", artifacts[VECTOR_MODEL] / "model.onnx", ("embedding",))
