"""The real engine's graph run by hand, with a tiny model (the one by which grammars are tried)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
import pytest
from openvino import opset13

from pipeline.bundled import TEXT_MODEL
from services.inference.artifact import Manifest
from services.inference.backends.alone import Alone
from services.inference.backends.jobs import Job, Sampling
from services.inference.backends.paged import Paged
from services.inference.backends.texts import open_text

Logits = npt.NDArray[np.float32]
LOUDER = ("v_proj.weight", "o_proj.weight")
IDS = (700, 8000, 9, 10500, 11, 12, 300, 40, 5000, 6)


class Tiny:
    """Its folder and its manifest. As it is, each token would be followed by itself: here attention
    outweighs the rest, so that what follows hangs on all that came before."""

    def __init__(self, artifact: Path, folder: Path) -> None:
        manifest = Manifest.read(artifact)
        found = manifest.text
        assert found is not None
        assert found.grammar is not None
        model = openvino.Core().read_model(artifact / found.grammar)
        for node in model.get_ordered_ops():
            if node.get_type_name() == "Constant" and node.get_friendly_name().endswith(LOUDER):
                louder = opset13.constant((node.data * 12).astype(np.float16))
                node.output(0).replace(louder.output(0))
        self.folder, self.weights = folder, folder / "openvino_model.xml"
        openvino.save_model(model, self.weights)
        spec = found.model_copy(update={"weights": self.weights.name, "guesses": 7})
        self.manifest = manifest.model_copy(update={"text": spec})

    def logits(self, ids: Sequence[int]) -> Logits:
        """After each token, in FP32, by the graph as it is in the file."""
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        request = openvino.Core().compile_model(self.weights, "CPU", exact).create_infer_request()
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found: Logits = request.infer(inputs)["logits"][0]
        return found


@pytest.fixture(scope="module")
def tiny(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(artifacts[TEXT_MODEL], tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def logits(tiny: Tiny) -> Logits:
    return tiny.logits(IDS)


@pytest.fixture(scope="module")
def paged(tiny: Tiny) -> Paged:
    return Paged(tiny.weights, 64, (1, 4))


def is_likeliest(found: Sequence[int], logits: Logits) -> bool:
    """To what the processor's own precision makes of them."""
    best = logits.max(axis=-1)
    near = 0.02 * (best - logits.mean(axis=-1))
    return bool((logits[np.arange(len(found)), list(found)] >= best - near).all())


@pytest.mark.parametrize("lengths", [(10,), (6, 4), (6, 1, 1, 1, 1), (3, 4, 3), (1, 4, 4, 1)])
def test_tokens_are_the_graphs_own_however_they_are_fed(
    paged: Paged, logits: Logits, lengths: tuple[int, ...]
) -> None:
    found: list[int] = []
    for length in lengths:
        past = len(found)
        found += paged.likeliest(IDS[past : past + length], past, length)
    assert is_likeliest(found, logits)


@pytest.mark.parametrize("length", [3, 4])
def test_what_was_guessed_wrongly_is_forgotten(paged: Paged, logits: Logits, length: int) -> None:
    paged.likeliest(IDS[:4], 0, 1)
    paged.likeliest([IDS[4], 77, 78, 79][:length], 4, length)
    assert is_likeliest(paged.likeliest(IDS[5:], 5, 5), logits[5:])


def test_only_what_is_wanted_is_told(paged: Paged, logits: Logits) -> None:
    assert is_likeliest(paged.likeliest(IDS, 0, 2), logits[-2:])


def test_what_does_not_fit_the_cache_is_not_computed(paged: Paged) -> None:
    paged.likeliest(list(range(60)), 0, 1)
    paged.likeliest([1, 2, 3, 4], 60, 1)
    with pytest.raises(ValueError, match="65 tokens do not fit the cache, which holds 64"):
        paged.likeliest([1, 2, 3, 4], 61, 1)


def test_a_graph_of_another_kind_is_refused(tiny: Tiny) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        Paged(tiny.folder.parent / "openvino_detokenizer.xml", 64)


@pytest.mark.parametrize("small_bytes", [0, 1 << 30])
def test_opened_for_a_small_and_for_a_large_model(
    tiny: Tiny, small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.backends.guesses.SMALL_BYTES", small_bytes)
    runtime = open_text(tiny.manifest, tiny.folder, kv_cache_gib=1, max_sequences=4)
    assert isinstance(runtime, Alone)
    handle = runtime.add(1, Job(0, IDS, Sampling(40)))
    made: list[int] = []
    while not handle.is_over():
        runtime.step()
        made += handle.take().tokens
    assert len(made) == 40
    assert is_likeliest(made, tiny.logits([*IDS, *made[:-1]])[len(IDS) - 1 :])
