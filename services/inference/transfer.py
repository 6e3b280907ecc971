"""What reading from and writing to an artifact store have in common: file systems, words for their errors,
progress, and one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

BLOCK = 16 << 20
"""Bytes of one request when a remote file is read back."""

Progress = Callable[[int, int], None]
"""Told the bytes in place and the bytes in all after every chunk. What it raises ends the transfer."""


class Meter:
    """Counts for a Progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def add(self, count: int) -> None:
        """`count` is negative when something has to be done again."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def filesystem(uri: str) -> tuple[Any, str]:
    """The file system of `uri` and the path in it. An instance of our own: fsspec's shared ones remember
    listings and the state of transactions. Raises what fsspec raises: ValueError, ImportError, …"""
    fs, path = fsspec.core.url_to_fs(uri, skip_instance_cache=True)
    return fs, path.rstrip("/")


def digest_remote(fs: Any, path: str, size: int) -> str:
    """SHA-256 of the first `size` bytes of a file, read block by block."""
    hasher = hashlib.sha256()
    for start in range(0, size, BLOCK):
        hasher.update(fs.cat_file(path, start=start, end=min(start + BLOCK, size)))
    return hasher.hexdigest()


def full(err: BaseException) -> bool:
    """Whether there is no room where something was to be written."""
    return isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(err: BaseException) -> str:
    """The error of any file system in a few words."""
    if isinstance(err, OSError) and err.errno == errno.EDQUOT:
        return "the disk quota is used up"
    if isinstance(err, OSError) and err.errno == errno.EFBIG:
        return "the file is larger than files may be here"
    if full(err):
        return "the disk is full"
    if isinstance(err, PermissionError):
        return "permission denied"
    if isinstance(err, FileNotFoundError):
        return "there is no such file"
    return " ".join(str(err).split()) or type(err).__name__


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock in the file `path` among threads and processes; it ends with its holder. `waiting` is
    called ten times a second until then, and may raise to give up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(0.1)
            except OSError as err:
                if err.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                break  # this file system has no locks: what two writers mix up, the digests find
        yield
