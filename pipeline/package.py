"""Writing artifacts: files, their digests, the manifest; stored under the manifest's own digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from services.inference.artifact import (
    MANIFEST,
    Evaluation,
    FileDigest,
    Labels,
    Lineage,
    Manifest,
    digest_file,
)

Precision = Literal["fp16", "int8", "int4"]
"""Of weights."""


class ParityError(Exception):
    """What would be served does not compute what the checkpoint computes."""


class About(BaseModel):
    """What its maker knows of a model beyond its files; parts of the manifest. Raises ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluation: Evaluation = {}
    lineage: Lineage = Lineage()
    labels: Labels = {}

    def found(self, evaluation: dict[str, float], parent: str) -> About:
        """With the pipeline's own findings, where the maker has not said otherwise."""
        lineage = self.lineage if self.lineage.parent else self.lineage.model_copy(update={"parent": parent})
        return About(evaluation={**evaluation, **self.evaluation}, lineage=lineage, labels=self.labels)

    @property
    def parts(self) -> dict[str, Any]:
        """As arguments of a Manifest."""
        return {"evaluation": self.evaluation, "lineage": self.lineage, "labels": self.labels}


@dataclass(frozen=True, slots=True)
class Package:
    """A finished artifact on this machine."""

    folder: Path
    sha256: str
    manifest: Manifest

    @property
    def uri(self) -> str:
        return f"file://{self.folder.resolve()}"  # not as_uri: fsspec takes an escaped space for its name

    @property
    def size_bytes(self) -> int:
        return self.manifest.size_bytes


def staging_folder(store: Path) -> Path:
    """A new folder beside the artifacts, to be filled and sealed."""
    store.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=store, prefix=".staging-"))


def digests(folder: Path) -> dict[str, FileDigest]:
    """Of every file below `folder`, the manifest apart."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        str(p.relative_to(folder)): FileDigest(sha256=digest_file(p), size=p.stat().st_size) for p in files
    }


def seal(staging: Path, manifest: Manifest, store: Path) -> Package:
    """Write the manifest into `staging` and move the folder to `store`/<digest>; the same content sealed
    twice is one artifact."""
    raw = manifest.model_dump_json(indent=1, exclude_defaults=True).encode()
    (staging / MANIFEST).write_bytes(raw)
    sha256 = hashlib.sha256(raw).hexdigest()
    folder = store / sha256
    if folder.exists():
        shutil.rmtree(staging)
    else:
        store.mkdir(parents=True, exist_ok=True)
        staging.chmod(0o755)
        staging.rename(folder)
    return Package(folder, sha256, manifest)


def opened(folder: Path) -> Package:
    """An artifact that was sealed earlier. Raises FileNotFoundError if there is none."""
    raw = (folder / MANIFEST).read_bytes()
    return Package(folder, hashlib.sha256(raw).hexdigest(), Manifest.model_validate_json(raw))
