"""Plans: what one is built from and for, where it is kept, and how Triton is told of it.

A plan runs on the kind of GPU and with the version of TensorRT that it was built with, and nowhere else. So
it is never part of an artifact: it is built where it is to run, and kept under a fingerprint of all that went
into it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tritonclient.grpc import model_config_pb2 as config_pb2

from services.inference.gpu import Gpu
from services.inference.transfer import locked

PLAN = "model.plan"
RECIPE = "recipe.json"
PARTIAL = "model.plan.partial"
FORMAT = 1  # of recipes: another number builds everything anew
MAX_BATCH = 64
BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PREFERRED = (4, 8, 16, 32, 64)
QUEUE_DELAY_US = 300


class BuildFailed(Exception):
    """TensorRT did not build a plan; the text is its own."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes that a plan takes: 1 to `batch` rows of `shortest` to `longest` tokens; fastest with `best` rows
    of `longest`."""

    shortest: int
    longest: int
    best: int
    batch: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a plan depends on."""

    onnx_sha256: str
    precision: str
    inputs: tuple[str, ...]
    profiles: tuple[Profile, ...]
    gpu: str
    capability: str
    driver: str
    cuda: str
    tensorrt: str
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Builder(Protocol):
    """Makes plans. `version` is TensorRT's, "" if there is none here."""

    @property
    def version(self) -> str: ...

    def build(self, onnx: Path, plan: Path, recipe: Recipe) -> None:
        """Write `plan`. Blocks for minutes. Raises BuildFailed."""


def profiles(max_tokens: int, batch: int = MAX_BATCH) -> tuple[Profile, ...]:
    """One for each bucket of lengths, so that short texts do not run with kernels that were chosen for long
    ones. The last one ends at `max_tokens`."""
    ends = [*(end for end in BUCKETS if end < max_tokens), max_tokens]
    return tuple(
        Profile(begin + 1, end, min(16, batch), batch) for begin, end in zip([0, *ends], ends, strict=False)
    )


def padded(length: int, max_tokens: int) -> int:
    """To how many tokens a text is padded: Triton batches only what has one shape."""
    return next(p.longest for p in profiles(max_tokens) if length <= p.longest)


def recipe(onnx_sha256: str, inputs: tuple[str, ...], max_tokens: int, gpu: Gpu, tensorrt: str) -> Recipe:
    """For half precision on this GPU."""
    shapes = profiles(max_tokens)
    return Recipe(
        onnx_sha256, "fp16", inputs, shapes, gpu.name, gpu.capability, gpu.driver, gpu.cuda, tensorrt
    )


class Plans:
    """A folder of plans by fingerprint; any number of processes may share it. Blocking: call it from a
    thread."""

    def __init__(self, root: Path, builder: Builder) -> None:
        self._root = root
        self._builder = builder

    @property
    def version(self) -> str:
        return self._builder.version

    def get(self, onnx: Path, of: Recipe, waiting: Callable[[], None] = lambda: None) -> Path:
        """The plan, built now if it is not there or was damaged. `waiting` is called while somebody else
        builds. Raises BuildFailed, OSError."""
        folder = self._root / of.fingerprint
        plan, told = folder / PLAN, folder / RECIPE
        with locked(self._root / ".locks" / of.fingerprint, waiting):
            if plan.is_file() and _told(told) == _digest(plan):
                return plan
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / PARTIAL
            partial.unlink(missing_ok=True)
            self._builder.build(onnx, partial, of)
            if not partial.is_file() or not partial.stat().st_size:
                raise BuildFailed("TensorRT ended without a plan")
            body = {"recipe": asdict(of), "sha256": _digest(partial)}
            told.write_text(json.dumps(body, indent=1))
            partial.replace(plan)
        return plan


def config(inputs: tuple[str, ...], outputs: dict[str, int], max_tokens: int) -> Any:
    """Triton's configuration of a plan; `outputs` by name with their components, -1: one a token."""
    found = config_pb2.ModelConfig(platform="tensorrt_plan", max_batch_size=MAX_BATCH)
    found.default_model_filename = PLAN
    for name in inputs:
        found.input.add(name=name, data_type=config_pb2.TYPE_INT64, dims=[-1])
    for name, components in outputs.items():
        found.output.add(name=name, data_type=config_pb2.TYPE_FP32, dims=[components])
    group = found.instance_group.add(count=1, kind=config_pb2.ModelInstanceGroup.KIND_GPU)
    group.profile.extend(str(index) for index in range(len(profiles(max_tokens))))
    found.dynamic_batching.preferred_batch_size.extend(PREFERRED)
    found.dynamic_batching.max_queue_delay_microseconds = QUEUE_DELAY_US
    return found


def _told(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
