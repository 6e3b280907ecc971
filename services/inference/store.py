"""Fetching artifacts from any fsspec file system into a local folder; every byte is checked."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.core.signing import SignatureRefused, TrustedKeys
from services.inference.artifact import (
    CHUNK,
    MANIFEST,
    MAX_MANIFEST,
    FileDigest,
    InvalidManifest,
    Manifest,
    digest_file,
)
from services.inference.transfer import Meter, Progress, filesystem, full, locked, reason

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
PARTIAL = ".partial"  # in an artifact's folder; its files are named by the digest that they will have
LOCKS = ".locks"


class ArtifactRefused(Exception):
    """The artifact is missing, incomplete or not what its digest says; the text names the file."""


class ArtifactUnreachable(ArtifactRefused):
    """It cannot be had now, but may be later: its place does not answer or is empty, or ours is full."""


class Store:
    """A folder of verified artifacts, one sub-folder per digest. Blocking: call it from a thread.

    With `trusted`, nothing is fetched that no trusted key has signed."""

    def __init__(self, root: Path, trusted: TrustedKeys | None = None) -> None:
        self._root = root
        self._trusted = trusted
        self._closed = threading.Event()

    def close(self) -> None:
        """End what is being fetched; the rest is fetched when it is asked for again."""
        self._closed.set()

    def fetch(
        self,
        uri: str,
        sha256: str,
        *,
        model: str = "",
        signature: bytes = b"",
        signer: str = "",
        progress: Progress | None = None,
    ) -> Path:
        """The local folder of an artifact, complete and verified now. What is there already and intact is
        kept, the beginning of a file too, so that an interrupted fetch goes on where it stopped. `model`,
        `signature` and `signer` are the record's, for those who demand signatures. Raises ArtifactRefused."""
        if self._trusted is not None:
            try:
                self._trusted.verify(model, sha256, signature, signer)
            except SignatureRefused as err:
                raise ArtifactRefused(f"{uri}: {err}") from err
        folder = self._root / sha256
        with _writing(uri, folder), locked(self._root / LOCKS / sha256, self.go_on):
            folder.mkdir(exist_ok=True)
            source = _Source(uri)
            manifest = self._manifest(source, folder, sha256)
            told = Meter(manifest.size_bytes, self._watched(uri, progress))
            missing = {n: f for n, f in manifest.files.items() if not _intact(folder / n, f.sha256)}
            told.add(manifest.size_bytes - sum(file.size for file in missing.values()))
            self._check_room(uri, folder, missing)
            for name, expected in missing.items():
                self._fetch(source, folder, name, expected, told)
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        return folder

    def _manifest(self, source: _Source, folder: Path, sha256: str) -> Manifest:
        path = folder / MANIFEST
        if not _intact(path, sha256):
            raw = source.beginning(MANIFEST, MAX_MANIFEST)
            if (found := hashlib.sha256(raw).hexdigest()) != sha256:
                raise _corrupt(source.uri, MANIFEST, found, sha256)
            partial = folder / PARTIAL / sha256
            with _writing(source.uri, folder):
                partial.parent.mkdir(exist_ok=True)
                partial.write_bytes(raw)
                partial.replace(path)
        try:
            return Manifest.read(folder)
        except InvalidManifest as err:
            raise ArtifactRefused(f"{source.uri}/{MANIFEST} is not a manifest: {err}") from err

    def _fetch(self, source: _Source, folder: Path, name: str, expected: FileDigest, told: Meter) -> None:
        """Bring one file, from where its partial copy ends; a partial copy that was bad is thrown away."""
        path, partial = folder / name, folder / PARTIAL / expected.sha256
        with _writing(source.uri, folder):
            partial.parent.mkdir(exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            resumed, found = source.copy(name, partial, expected.size, told)
            if found == expected.sha256:
                with _writing(source.uri, folder):
                    partial.replace(path)
                return
            length = partial.stat().st_size
            told.add(-length)
            partial.unlink()
            if not resumed:
                break
            log.warning("%s/%s: its partial copy was of no use; fetching it anew", source.uri, name)
        if length > expected.size:
            raise ArtifactRefused(f"{source.uri}/{name} is corrupt: it is longer than {expected.size} bytes")
        raise _corrupt(source.uri, name, found, expected.sha256)

    def _check_room(self, uri: str, folder: Path, missing: dict[str, FileDigest]) -> None:
        """Before the disk is filled, because others write to it too."""
        partials = folder / PARTIAL
        here = sum(file.stat().st_size for file in partials.iterdir()) if partials.is_dir() else 0
        needed = sum(file.size for file in missing.values()) - here
        if needed > (free := shutil.disk_usage(folder).free):
            raise ArtifactUnreachable(
                f"{uri} cannot be kept in {folder}: the disk is full ({needed} bytes needed, {free} free)"
            )

    def _watched(self, uri: str, progress: Progress | None) -> Progress:
        """Tells `progress` of everything and the log of what takes long, and ends what nobody waits for."""
        told_at = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal told_at
            self.go_on()
            if progress is not None:
                progress(done, total)
            if time.monotonic() - told_at >= LOG_EVERY_S:
                told_at = time.monotonic()
                log.info("%s: %d of %d MB", uri, done // 1_000_000, total // 1_000_000)

        return tell

    def go_on(self) -> None:
        """Raises ArtifactUnreachable once the store is closed."""
        if self._closed.is_set():
            raise ArtifactUnreachable("the service is stopping")


class _Source:
    """The artifact where it is published."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        with self._reading(MANIFEST):
            self._fs, self._base = filesystem(uri)
            protocols = self._fs.protocol
            http = not {"http", "https"}.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        # As one stream, which servers without ranges can send, too.
        self._whole: dict[str, Any] = {"block_size": 0} if http else {}

    def beginning(self, name: str, size: int) -> bytes:
        """At most `size` bytes."""
        raw = b""
        with self._reading(name), self._open(name, 0)[0] as file:
            while len(raw) < size and (chunk := file.read(min(CHUNK, size - len(raw)))):
                raw += chunk
        return raw

    def copy(self, name: str, partial: Path, size: int, told: Meter) -> tuple[bool, str]:
        """Append to `partial` what it lacks, one byte more than `size` at most: whether it had a beginning
        that was used, and the digest of the whole. What was copied stays when reading fails."""
        with _writing(self.uri, partial):
            hasher, have = _beginning(partial, size)
        with self._reading(name):
            source, resumed = self._open(name, have)
        with source:
            if not resumed:
                hasher, have = hashlib.sha256(), 0
            told.add(have)
            with _writing(self.uri, partial):
                target = partial.open("ab")
            with target:
                with _writing(self.uri, partial):
                    target.truncate(have)
                while have <= size:
                    with self._reading(name):
                        chunk = source.read(min(CHUNK, size - have + 1))
                    if not chunk:
                        break
                    hasher.update(chunk)
                    with _writing(self.uri, partial):
                        target.write(chunk)
                        target.flush()
                    have += len(chunk)
                    told.add(len(chunk))
        return resumed, hasher.hexdigest()

    def _open(self, name: str, position: int) -> tuple[Any, bool]:
        """The file, at `position` if its place can do that: then True, otherwise at its start."""
        path = f"{self._base}/{name}"
        if position:
            source = self._fs.open(path, "rb")
            try:
                source.seek(position)
                source.read(1)  # some find out only now that the server has no ranges
                source.seek(position)
                return source, True
            except (ValueError, NotImplementedError):
                source.close()
        return self._fs.open(path, "rb", **self._whole), False

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # each file system has errors of its own
            raise ArtifactUnreachable(f"{self.uri}/{name} cannot be read: {reason(err)}") from err


@contextmanager
def _writing(uri: str, path: Path) -> Iterator[None]:
    """Errors of our own disk; what fills it is removed, for others write to it too."""
    try:
        yield
    except OSError as err:
        if full(err) and path.is_file():
            path.unlink()
        raise ArtifactUnreachable(f"{uri} cannot be kept in {path}: {reason(err)}") from err


def _beginning(partial: Path, size: int) -> tuple[Any, int]:
    """What is left of an earlier try: its digest so far and its length."""
    hasher = hashlib.sha256()
    if not partial.is_file() or partial.stat().st_size > size:
        return hasher, 0
    with partial.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
        return hasher, file.tell()


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and digest_file(path) == sha256


def _corrupt(uri: str, name: str, found: str, expected: str) -> ArtifactRefused:
    return ArtifactRefused(f"{uri}/{name} is corrupt: its SHA-256 is {found}, not {expected}")
