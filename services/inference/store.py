"""Fetching artifacts from any fsspec file system into a local folder; every byte is checked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec
from pydantic import ValidationError

from services.inference.artifact import CHUNK, MANIFEST, Manifest, digest_file


class ArtifactRefused(Exception):
    """The artifact is missing, incomplete or not what its digest says; the text names the file."""


class ArtifactUnreachable(ArtifactRefused):
    """The place where it should be does not answer, or does not have it; it may later."""


class Store:
    """A folder of verified artifacts, one sub-folder per digest. Blocking: call it from a thread."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def fetch(self, uri: str, sha256: str) -> Path:
        """The local folder of an artifact, complete and verified now. Files that are there already and
        intact are kept, so that an interrupted fetch goes on where it stopped. Raises ArtifactRefused."""
        folder = self._root / sha256
        self._ensure(uri, folder, MANIFEST, sha256)
        try:
            manifest = Manifest.read(folder)
        except ValidationError as err:
            raise ArtifactRefused(f"{uri}/{MANIFEST} is not a manifest: {err.errors()[0]['msg']}") from err
        for name, expected in manifest.files.items():
            self._ensure(uri, folder, name, expected.sha256)
        return folder

    def _ensure(self, uri: str, folder: Path, name: str, sha256: str) -> None:
        path = folder / name
        if path.is_file() and digest_file(path) == sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + f".{os.getpid()}.part")
        hasher = hashlib.sha256()
        try:
            with fsspec.open(f"{uri.rstrip('/')}/{name}", "rb") as source, partial.open("wb") as target:
                while chunk := source.read(CHUNK):
                    hasher.update(chunk)
                    target.write(chunk)
            if hasher.hexdigest() != sha256:
                raise ArtifactRefused(
                    f"{uri}/{name} is corrupt: its SHA-256 is {hasher.hexdigest()}, not {sha256}"
                )
            partial.replace(path)
        except ArtifactRefused:
            raise
        except Exception as err:  # each file system has errors of its own
            raise ArtifactUnreachable(f"{uri}/{name} cannot be read: {err}") from err
        finally:
            partial.unlink(missing_ok=True)
