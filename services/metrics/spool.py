"""A bounded spool on disk for points, as files of records that are only ever appended to.

A record is kept when `append` returns: it is on the disk before (fdatasync). After a crash or kill -9 a
record may be cut off at the end of a file; nobody was told that it is kept. A record that was damaged later
is skipped and counted. A process begins a new file each time, and a file goes when all of it was taken:
batches have names, so that what is read again after a crash is not kept twice.

When the spool is full, the newest is refused: whoever was told that points are kept can rely on it, and who
was not may send them again.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from services.core.errors import BackendUnavailable, LingquError
from services.metrics.points import Labels, Point

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
SEGMENT_BYTES = 16 << 20
SEGMENT_RECORDS = 500
"""Fewer than the names of batches that DuckStore knows."""
MAX_RECORD_BYTES = 256 << 20
SUFFIX = ".spool"
_MAGIC = b"\xf1LQspool"
_HEADER = struct.Struct("<8sIIII")  # magic, bytes and points that follow, their CRC-32, that of the header


class Record(NamedTuple):
    """`end`: where it ends in its file."""

    batch: str
    points: list[Point]
    end: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is in the spool, and what was found damaged since the start: records, and points in them as far as
    that can be told."""

    size: int
    points: int
    corrupt: int
    lost: int


class Spool:
    """Records in order: `append` at one end, `first` and `taken` at the other. For any thread; one taker."""

    def __init__(self, folder: Path, most_bytes: int = MAX_BYTES, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Raises BackendUnavailable if the folder cannot be used."""
        self._folder, self._most, self._segment_bytes = folder, most_bytes, segment_bytes
        self._lock = threading.Lock()
        self._sizes: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}
        self._writing: Path | None = None
        self._records = 0
        self._number = 0
        self._position = 0  # in the first file
        self._corrupt = 0
        self._lost = 0
        self._damages: set[int] = set()  # where, in the first file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                self._sizes[path] = path.stat().st_size
                with path.open("rb") as file:
                    self._counts[path] = sum(header.points for header in _headers(file, 0))
                self._number = max(self._number, int(path.stem))
        except (OSError, ValueError) as err:
            raise BackendUnavailable(f"the spool of metrics in {folder} cannot be used: {err}") from err

    @property
    def waiting(self) -> Waiting:
        with self._lock:
            return Waiting(sum(self._sizes.values()), sum(self._counts.values()), self._corrupt, self._lost)

    def append(self, points: Sequence[Point], batch: str) -> None:
        """Raises BackendUnavailable if the spool or the disk is full: nothing is kept then."""
        record = _encoded(points, batch)
        with self._lock:
            if sum(self._sizes.values()) + len(record) > self._most:
                raise BackendUnavailable(f"the spool of metrics is full ({self._most:,} bytes)")
            path = self._file()
            before = self._sizes[path]
            try:
                _append(path, record)
            except OSError as err:
                self._cut(path, before)
                raise BackendUnavailable(
                    f"the spool of metrics cannot be written: {err.strerror or err}"
                ) from err
            self._sizes[path] += len(record)
            self._counts[path] += len(points)
            self._records += 1

    def first(self) -> Record | None:
        """The oldest record that can be read; None if there is none. The same until it was `taken`."""
        with self._lock:
            while self._sizes:
                path = next(iter(self._sizes))
                found = self._next(path)
                if found is not None:
                    return found
                self._remove(path)
            return None

    def taken(self, record: Record) -> None:
        """It is kept elsewhere; its file goes with its last record."""
        with self._lock:
            path = next(iter(self._sizes))
            self._position = record.end
            self._counts[path] -= len(record.points)
            if record.end >= self._sizes[path]:
                self._remove(path)

    def _file(self) -> Path:
        """The one to append to."""
        path = self._writing
        if (
            path is None
            or path not in self._sizes
            or self._sizes[path] >= self._segment_bytes
            or self._records >= SEGMENT_RECORDS
        ):
            self._number += 1
            path = self._writing = self._folder / f"{self._number:012d}{SUFFIX}"
            self._sizes[path] = self._counts[path] = self._records = 0
        return path

    def _cut(self, path: Path, size: int) -> None:
        """Take back a part of a record; where that fails, too, it is skipped as cut off."""
        self._writing = None
        try:
            os.truncate(path, size)
        except OSError as err:
            log.warning("part of a record stays in %s: %s", path, err)
        if size == 0:
            self._sizes.pop(path, None)
            self._counts.pop(path, None)
            path.unlink(missing_ok=True)

    def _next(self, path: Path) -> Record | None:
        try:
            with path.open("rb") as file:
                for header in _headers(file, self._position, lambda at: self._damaged(path, at, 0)):
                    file.seek(header.begin)
                    payload = file.read(header.size)
                    if zlib.crc32(payload) == header.crc:
                        return Record(*_decoded(payload), header.begin + header.size)
                    self._damaged(path, header.begin, header.points)
        except OSError as err:
            raise BackendUnavailable(f"the spool of metrics cannot be read: {err.strerror or err}") from err
        return None

    def _damaged(self, path: Path, at: int, points: int) -> None:
        if at not in self._damages:
            self._damages.add(at)
            self._corrupt += 1
            self._lost += points
            self._counts[path] -= points
            log.error("a record of the spool is damaged and skipped: %s at %d", path, at)

    def _remove(self, path: Path) -> None:
        del self._sizes[path], self._counts[path]
        self._position = 0
        self._damages.clear()
        path.unlink(missing_ok=True)


class _Header(NamedTuple):
    begin: int
    size: int
    points: int
    crc: int


def _headers(file: BinaryIO, at: int, damaged: Callable[[int], None] = lambda at: None) -> Iterator[_Header]:
    """Of the whole records from `at` on; what is damaged between them is told and skipped."""
    end = file.seek(0, os.SEEK_END)
    while at + _HEADER.size <= end:
        file.seek(at)
        raw = file.read(_HEADER.size)
        magic, size, points, crc, own = _HEADER.unpack(raw)
        if magic != _MAGIC or own != zlib.crc32(raw[:-4]):
            damaged(at)
            file.seek(at + 1)
            next_at = file.read(SEGMENT_BYTES + MAX_RECORD_BYTES).find(_MAGIC)
            if next_at < 0:
                return
            at += 1 + next_at
            continue
        begin = at + _HEADER.size
        if begin + size > end:
            return
        yield _Header(begin, size, points, crc)
        at = begin + size


def _encoded(points: Sequence[Point], batch: str) -> bytes:
    """Each series with its names once."""
    numbers: dict[tuple[str, Labels, tuple[str, ...]], int] = {}
    rows = []
    for point in points:
        key = (point.measurement, point.labels, tuple(point.fields))
        number = numbers.setdefault(key, len(numbers))
        rows.append((number, point.time_ns, [float(value) for value in point.fields.values()]))
    payload = zlib.compress(orjson.dumps([batch, list(numbers), rows]), 1)
    if len(payload) > MAX_RECORD_BYTES:
        raise LingquError(f"a batch of {len(points):,} points is too large for the spool")
    head = _HEADER.pack(_MAGIC, len(payload), len(points), zlib.crc32(payload), 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little") + payload


def _decoded(payload: bytes) -> tuple[str, list[Point]]:
    batch, known, rows = orjson.loads(zlib.decompress(payload))
    series = [
        (name, tuple((label, value) for label, value in labels), fields) for name, labels, fields in known
    ]
    return batch, [
        Point(
            series[number][0], series[number][1], dict(zip(series[number][2], values, strict=True)), time_ns
        )
        for number, time_ns, values in rows
    ]


def _append(path: Path, record: bytes) -> None:
    new = not path.exists()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        left = memoryview(record)
        while left:
            left = left[os.write(file, left) :]
        os.fdatasync(file)
    finally:
        os.close(file)
    if new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
