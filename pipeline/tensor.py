"""Any model for Triton's Python backend, with its own config.pbtxt, as an artifact.

Such an artifact contains code that Triton will run: publish only what you would run yourself."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.package import Package, digests, seal, staging_folder
from services.inference.artifact import Manifest, TensorSpec


def package_tensor(folder: Path, store: Path) -> Package:
    """`folder` holds config.pbtxt, model.py and whatever they need."""
    for name in ("config.pbtxt", "model.py"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}/{name} is missing")
    staging = staging_folder(store)
    shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    manifest = Manifest(
        task="tensor",
        runtime="python",
        files=digests(staging),
        tensor=TensorSpec(config="config.pbtxt", model="model.py"),
    )
    return seal(staging, manifest, store)
