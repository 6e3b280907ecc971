"""Putting artifacts into a store: any folder of any fsspec file system, one sub-folder per digest.

What is there is never changed, only completed. The manifest goes last: without it an artifact is not there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from services.inference.artifact import (
    CHUNK,
    MANIFEST,
    FileDigest,
    InvalidManifest,
    Manifest,
    digest_file,
)
from services.inference.store import LOCKS, PARTIAL
from services.inference.transfer import Meter, Progress, digest_remote, filesystem, full, locked, reason

# Their folders exist when there is something in them, and making one could make a bucket.
WITHOUT_FOLDERS = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"}


class PushFailed(Exception):
    """The artifact could not be brought into the store; the text names the file and the reason."""


def push(folder: Path, store: str, progress: Progress | None = None) -> str:
    """Copy the artifact in `folder` into the store at the URI (or local path) `store`, read back what was
    written, and return the artifact's URI there.

    If it is there already, this is only a check of the manifest and of the sizes. An interrupted push goes on
    with the file where it stopped, and within the file if the store is a local folder. Any number of pushes
    of the same artifact may run at once. Raises PushFailed."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = Manifest.parse(raw)
    except (OSError, InvalidManifest) as err:
        raise PushFailed(f"{folder} is no artifact: {MANIFEST}: {reason(err)}") from err
    sha256 = hashlib.sha256(raw).hexdigest()
    root = store if "://" in store else f"file://{Path(store).absolute()}"
    uri = f"{root}{'' if root.endswith('/') else '/'}{sha256}"
    with _doing(uri):
        fs, base = filesystem(uri)
    told = Meter(manifest.size_bytes, progress)
    target = _LocalTarget(fs, uri, base) if isinstance(fs, LocalFileSystem) else _Target(fs, uri, base)
    if target.whole(manifest, raw):
        told.add(manifest.size_bytes)
        return uri
    with target.lock():
        for name, expected in manifest.files.items():
            if target.intact(name, expected):
                told.add(expected.size)
            else:
                target.put(folder / name, name, expected, told)
        target.put_manifest(raw)
    return uri


class _Target:
    """The artifact's place in a store whose files appear whole, when they are closed, or not at all: that is
    what fsspec's transactions promise."""

    def __init__(self, fs: Any, uri: str, base: str) -> None:
        self._fs = fs
        self._uri = uri
        self._base = base

    def lock(self) -> AbstractContextManager[None]:
        """None is needed: all writers write the same."""
        return nullcontext()

    def whole(self, manifest: Manifest, raw: bytes) -> bool:
        """Whether a push has come to its end here, and everything still has its size."""
        try:
            if self._fs.cat_file(f"{self._base}/{MANIFEST}") != raw:
                return False
        except FileNotFoundError:
            return False
        except Exception as err:
            raise PushFailed(f"{self._uri}/{MANIFEST} cannot be read: {reason(err)}") from err
        return all(self._size(name) == file.size for name, file in manifest.files.items())

    def intact(self, name: str, expected: FileDigest) -> bool:
        if self._size(name) != expected.size:
            return False
        with _doing(f"{self._uri}/{name}"):
            return digest_remote(self._fs, f"{self._base}/{name}", expected.size) == expected.sha256

    def put(self, source: Path, name: str, expected: FileDigest, told: Meter) -> None:
        path = f"{self._base}/{name}"
        with _doing(f"{self._uri}/{name}"):
            self._make_folder(path)
            with self._fs.transaction, self._fs.open(path, "wb") as target:
                self._copy(source, 0, target, told)
        if not self.intact(name, expected):
            self._discard(path, source, name, expected)

    def put_manifest(self, raw: bytes) -> None:
        path = f"{self._base}/{MANIFEST}"
        with _doing(f"{self._uri}/{MANIFEST}"):
            self._make_folder(path)
            with self._fs.transaction, self._fs.open(path, "wb") as target:
                target.write(raw)
            if self._fs.cat_file(path) != raw:
                self._fs.rm_file(path)
                raise PushFailed(f"{self._uri}/{MANIFEST}: what was read back is not what was written")

    def _copy(self, source: Path, start: int, target: Any, told: Meter) -> None:
        try:
            file = source.open("rb")
        except OSError as err:
            raise PushFailed(f"{source} cannot be read: {reason(err)}") from err
        with file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                target.write(chunk)
                told.add(len(chunk))

    def _size(self, name: str) -> int | None:
        try:
            info = self._fs.info(f"{self._base}/{name}")
        except FileNotFoundError:
            return None
        except Exception as err:
            raise PushFailed(f"{self._uri}/{name} cannot be looked at: {reason(err)}") from err
        return int(info["size"]) if info["type"] == "file" else None

    def _make_folder(self, path: str) -> None:
        protocols = self._fs.protocol
        if WITHOUT_FOLDERS.isdisjoint([protocols] if isinstance(protocols, str) else protocols):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _discard(self, path: str, source: Path, name: str, expected: FileDigest) -> None:
        """Take away what came out wrong. Raises PushFailed, saying whose fault it is."""
        with _doing(f"{self._uri}/{name}"):
            self._fs.rm_file(path)
        if (found := digest_file(source)) != expected.sha256:
            raise PushFailed(f"{source} is corrupt: its SHA-256 is {found}, not {expected.sha256}")
        raise PushFailed(f"{self._uri}/{name}: what was read back is not what was written")


class _LocalTarget(_Target):
    """The same in a local folder: a file grows under another name, is read back and then renamed, so that
    it can be gone on with. Writers take turns."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        base = Path(self._base)
        with _doing(self._uri), locked(base.parent / LOCKS / base.name):
            yield

    def put(self, source: Path, name: str, expected: FileDigest, told: Meter) -> None:
        path, partial = f"{self._base}/{name}", f"{self._base}/{PARTIAL}/{expected.sha256}"
        for _ in range(2):
            start = self._size(f"{PARTIAL}/{expected.sha256}") or 0
            if start > expected.size:
                start = 0
            told.add(start)
            with _doing(f"{self._uri}/{name}"), _room_made(partial):
                self._make_folder(partial)
                with self._fs.open(partial, "ab" if start else "wb") as target:
                    self._copy(source, start, target, told)
                    target.flush()
                    os.fsync(target.fileno())  # or a power cut could leave a manifest without its files
            if self.intact(f"{PARTIAL}/{expected.sha256}", expected):
                with _doing(f"{self._uri}/{name}"):
                    self._make_folder(path)
                    Path(partial).replace(path)
                return
            if start:  # the beginning was of no use
                told.add(-Path(partial).stat().st_size)
                Path(partial).unlink()
            else:
                self._discard(partial, source, name, expected)

    def put_manifest(self, raw: bytes) -> None:
        partial = Path(self._base) / PARTIAL / MANIFEST
        with _doing(f"{self._uri}/{MANIFEST}"):
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(raw)
            partial.replace(Path(self._base) / MANIFEST)
            shutil.rmtree(partial.parent, ignore_errors=True)


@contextmanager
def _room_made(partial: str) -> Iterator[None]:
    """What fills a disk is removed from it, for others write to it too."""
    try:
        yield
    except OSError as err:
        if full(err):
            Path(partial).unlink(missing_ok=True)
        raise


@contextmanager
def _doing(what: str) -> Iterator[None]:
    try:
        yield
    except PushFailed:
        raise
    except Exception as err:  # each file system has errors of its own
        raise PushFailed(f"{what} cannot be written: {reason(err)}") from err
