"""Triton's model repository as the agent writes it: one folder a model, one numbered folder a version.

Triton loads a version again when the time stamps in its folder have changed, so a folder is made
completely, byte code included, before it is moved into place, and never touched afterwards.
"""

from __future__ import annotations

import py_compile
import secrets
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as config_pb2

from services.core.discovery import VersionKey
from services.core.files import write_secret
from services.inference.artifact import MANIFEST, EncoderSpec, Manifest, digest_file
from services.inference.backends import wire
from services.inference.tensorrt import plan as plans
from services.inference.tensorrt.plan import PLAN

_CLASS = "from services.inference.backends.{module} import TritonPythonModel as TritonPythonModel\n"
MAX_BATCH = 64
QUEUE_DELAY_US = 300  # how long the first request of a batch waits for others
MAX_QUEUE = 512  # requests of one priority that wait for an encoder; Triton refuses more
PRIORITIES, NORMAL = 3, 2  # as callers.Priority numbers them
# Requests may set a timeout of their own only below the model's.
MAX_WAIT_US = 600_000_000


class Repository:
    """Owns the folder. `parameters` are handed to every model but tensor models. `secret` is what text models
    know inference by; it outlives a restart, so that they need not be loaded again for it."""

    def __init__(self, root: Path, parameters: dict[str, str]) -> None:
        self.root = self._root = root.resolve()
        self._root.mkdir(parents=True, exist_ok=True)
        file = self._root.parent / "session.secret"
        if not file.is_file():
            write_secret(file, secrets.token_hex(16).encode())
        self.secret = file.read_text()
        self._parameters = {**parameters, "session_secret_file": str(file)}

    def add(self, key: VersionKey, folder: Path, manifest: Manifest, plan: Path | None = None) -> None:
        """Lay out a version; nothing changes if it is there already. Raises ValueError if Triton could not
        serve it beside the model's other versions: they share one configuration. `plan`: what TensorRT built
        of the artifact here; Triton runs it without a model.py."""
        home = self._root / key.model
        target = home / str(key.version)
        config = text_format.MessageToString(self._config(key.model, folder, manifest))
        home.mkdir(exist_ok=True)
        config_file = home / "config.pbtxt"
        if not config_file.is_file() or config_file.read_text() != config:
            if any(version != target for version in _versions(home)) and not (
                # Between two releases of ours, only what we add to every model differs.
                manifest.tensor is None and _alike(config_file, config)
            ):
                raise ValueError(
                    "its inputs, outputs or settings differ from those of the versions that are loaded; "
                    "publish it as a model of another name"
                )
            config_file.write_text(config)
        ours = None if manifest.tensor else _CLASS.format(module="text" if manifest.text else "encoder")
        same = target.is_dir() and _same(target / MANIFEST, folder / MANIFEST) and _links(target / PLAN, plan)
        if same and (ours is None or plan is not None or (target / "model.py").read_text() == ours):
            return  # with another model.py, an earlier release of ours laid it out
        staging = self._root / f".{key.model}.{key.version}"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        staging.mkdir()
        for name in (MANIFEST, *manifest.files):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).symlink_to((folder / name).resolve())
        if plan is not None:
            (staging / PLAN).symlink_to(plan.resolve())
            staging.rename(target)
            return
        model = staging / "model.py"
        if ours is not None:
            model.unlink(missing_ok=True)  # never through a link into the store
            model.write_text(ours)
        elif manifest.tensor is not None and manifest.tensor.model != "model.py":
            model.symlink_to((folder / manifest.tensor.model).resolve())
        py_compile.compile(str(model), cfile=str(_byte_code(model)), dfile=str(target / "model.py"))
        staging.rename(target)

    def remove(self, key: VersionKey) -> bool:
        """Take a version out; True if its model has others left."""
        home = self._root / key.model
        shutil.rmtree(home / str(key.version), ignore_errors=True)
        if _versions(home):
            return True
        shutil.rmtree(home, ignore_errors=True)
        return False

    def others(self, wanted: Container[VersionKey]) -> list[VersionKey]:
        """Versions that are laid out, by an earlier run for example, but not wanted."""
        laid_out = (
            VersionKey(v.parent.name, int(v.name)) for h in self._root.iterdir() for v in _versions(h)
        )
        return [key for key in laid_out if key not in wanted]

    def _config(self, name: str, folder: Path, manifest: Manifest) -> Any:
        if manifest.tensor is not None:
            config = text_format.Parse(
                (folder / manifest.tensor.config).read_text(), config_pb2.ModelConfig()
            )
        elif manifest.text is not None:
            config = _text_config()
        elif manifest.runtime == "tensorrt" and (spec := manifest.encoder) is not None:
            config = plans.config(tuple(spec.inputs), dict(spec.outputs), spec.max_tokens)
        else:
            assert manifest.encoder is not None  # noqa: S101 - Manifest has exactly one of the three
            config = _encoder_config(manifest.encoder)
        if config.backend == "python" and manifest.tensor is None:
            for key, value in self._parameters.items():
                config.parameters[key].string_value = value
        config.name = name
        config.version_policy.all.SetInParent()
        return config


def _versions(home: Path) -> list[Path]:
    return [child for child in home.iterdir() if child.name.isdigit()] if home.is_dir() else []


def _text_config() -> Any:
    config = config_pb2.ModelConfig(backend="python", max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    for name in (wire.SESSION, "text_input", "sampling_parameters"):
        config.input.add(name=name, data_type=config_pb2.TYPE_STRING, dims=[1], optional=True)
    config.output.add(name="text_output", data_type=config_pb2.TYPE_STRING, dims=[1])
    config.output.add(name="output_ids", data_type=config_pb2.TYPE_INT32, dims=[-1])
    config.output.add(name=wire.STEP, data_type=config_pb2.TYPE_INT32, dims=[-1, wire.COLUMNS])
    config.output.add(name=wire.LOGPROBS, data_type=config_pb2.TYPE_FP32, dims=[-1])
    config.instance_group.add(count=1, kind=config_pb2.ModelInstanceGroup.KIND_CPU)
    return config


def _encoder_config(spec: EncoderSpec) -> Any:
    config = config_pb2.ModelConfig(backend="python", max_batch_size=MAX_BATCH)
    for name in spec.inputs:
        # Ragged: texts of different lengths share a batch; the model pads them.
        config.input.add(name=name, data_type=config_pb2.TYPE_INT64, dims=[-1], allow_ragged_batch=True)
    for name, components in spec.outputs.items():
        config.output.add(name=name, data_type=config_pb2.TYPE_FP32, dims=[components])
    config.instance_group.add(count=1, kind=config_pb2.ModelInstanceGroup.KIND_CPU)
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = QUEUE_DELAY_US
    batching.priority_levels, batching.default_priority_level = PRIORITIES, NORMAL
    policy = batching.default_queue_policy
    policy.max_queue_size = MAX_QUEUE
    policy.timeout_action = config_pb2.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = MAX_WAIT_US
    policy.allow_timeout_override = True
    return config


def _alike(file: Path, text: str) -> bool:
    """Whether two configurations have the same inputs and outputs."""
    try:
        one, other = (text_format.Parse(read, config_pb2.ModelConfig()) for read in (file.read_text(), text))
    except (OSError, text_format.ParseError):
        return False
    return [*one.input, *one.output] == [*other.input, *other.output]


def _links(link: Path, plan: Path | None) -> bool:
    return plan is None or (link.is_symlink() and link.resolve() == plan.resolve())


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and digest_file(one) == digest_file(other)


def _byte_code(source: Path) -> Path:
    """Where the interpreter looks for it."""
    import importlib.util

    return Path(importlib.util.cache_from_source(str(source)))
