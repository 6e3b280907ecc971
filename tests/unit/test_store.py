"""Pushing and fetching artifacts: whole and intact whatever is broken or interrupted, and nothing twice."""

from __future__ import annotations

import http.server
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.suite import ECHO
from lingqu.artifacts import Artifact
from pipeline.package import About, Package
from pipeline.tensor import package_tensor
from services.core.signing import Signer, TrustedKeys
from services.inference import store as store_module
from services.inference.artifact import MANIFEST, Lineage
from services.inference.push import PushFailed, push
from services.inference.store import PARTIAL, ArtifactRefused, ArtifactUnreachable, Store

BIG = 5 << 20
WAIT_S = 30.0


class Line:
    """A connection that is cut after so many bytes, and counts them."""

    def __init__(self) -> None:
        self.left = 1 << 60
        self.read = 0
        self.written = 0

    def reset(self, left: int = 1 << 60) -> None:
        self.left, self.read, self.written = left, 0, 0

    def carry(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ConnectionError("the line was cut")


line = Line()


class CutFile(LocalFileOpener):  # type: ignore[misc]
    def read(self, size: int = -1) -> bytes:
        data: bytes = self.f.read(size)
        line.carry(len(data))
        line.read += len(data)
        return data

    def write(self, data: bytes) -> int:
        line.carry(len(data))
        line.written += len(data)
        count: int = self.f.write(data)
        return count


class CutFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Local files behind `line`. Reading back for verification goes by cat_file and is not counted."""

    protocol = ("cut",)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        return CutFile(path, mode, fs=self, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        raw = Path(self._strip_protocol(path)).read_bytes()
        return raw[start:end]


fsspec.register_implementation("cut", CutFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def whole_line() -> None:
    line.reset()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A version with a large file, one in a folder and an empty one."""
    home = tmp_path_factory.mktemp("model with space")
    shutil.copytree(ECHO, home / "echo", ignore=shutil.ignore_patterns("__pycache__"))
    (home / "echo" / "weights").mkdir()
    (home / "echo" / "weights" / "big.bin").write_bytes(os.urandom(BIG))
    (home / "echo" / "empty").touch()
    about = About(
        evaluation={"accuracy": 0.9},
        lineage=Lineage(parent="echo/1", source="abc"),
        labels={"team": "search"},
    )
    return package_tensor(home / "echo", home / "made", about)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def same(one: Path, other: Path) -> bool:
    """Whether the two folders hold the same files, those with a leading dot apart."""
    return contents(one) == contents(other)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.startswith(".")}


# --- there and back


@pytest.mark.parametrize(
    "root", ["file://{}/a store", "{}/plain", "memory://{}", "memory://x-{}/", "cut://{}"]
)
def test_what_is_pushed_is_what_is_fetched(root: str, tmp_path: Path, store: Store, package: Package) -> None:
    place = root.format(tmp_path)
    told: list[tuple[int, int]] = []
    uri = push(package.folder, place, lambda *now: told.append(now))
    assert uri.endswith("/" + package.sha256)
    assert told[-1] == (package.size_bytes, package.size_bytes)
    assert told == sorted(told)
    assert same(store.fetch(uri, package.sha256), package.folder)
    told.clear()
    assert push(package.folder, place, lambda *now: told.append(now)) == uri
    assert told == [(package.size_bytes, package.size_bytes)]


def test_pushing_again_moves_nothing_and_needs_no_permission(tmp_path: Path, package: Package) -> None:
    uri = push(package.folder, f"cut://{tmp_path}/s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    line.reset(left=0)
    assert push(package.folder, f"cut://{tmp_path}/s") == uri
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}


def test_only_what_is_missing_or_wrong_is_brought_again(tmp_path: Path, package: Package) -> None:
    push(package.folder, f"cut://{tmp_path}/s")
    there = tmp_path / "s" / package.sha256
    (there / "model.py").unlink()
    line.reset()
    push(package.folder, f"cut://{tmp_path}/s")
    assert line.written == (package.folder / "model.py").stat().st_size
    assert same(there, package.folder)
    (there / MANIFEST).unlink()
    (there / "model.py").write_bytes(b"x" * (package.folder / "model.py").stat().st_size)
    push(package.folder, f"cut://{tmp_path}/s")
    assert same(there, package.folder)


# --- interrupted


@pytest.mark.parametrize("root", ["cut", "memory"])
def test_a_push_that_was_cut_goes_on(root: str, tmp_path: Path, package: Package) -> None:
    place = f"{root}://{tmp_path}/s"

    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done > 3 << 20:
            raise Cut

    with pytest.raises(PushFailed):
        push(package.folder, place, cut)
    fs, base = fsspec.core.url_to_fs(f"{place}/{package.sha256}")
    assert not fs.exists(f"{base}/{MANIFEST}")
    assert not fs.exists(f"{base}/weights/big.bin")
    line.reset()
    push(package.folder, place)
    if root == "cut":
        assert line.written <= BIG - (3 << 20) + (1 << 20), "the beginning was kept"


def test_a_push_whose_beginning_was_spoilt_begins_anew(tmp_path: Path, package: Package) -> None:
    digest = package.manifest.files["weights/big.bin"].sha256
    partials = tmp_path / "s" / package.sha256 / PARTIAL
    partials.mkdir(parents=True)
    (partials / digest).write_bytes(b"\0" * (2 << 20))
    push(package.folder, f"file://{tmp_path}/s")
    assert same(tmp_path / "s" / package.sha256, package.folder)
    assert not partials.exists()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, BIG))
def test_a_fetch_that_was_cut_anywhere_goes_on_there(tmp_path: Path, package: Package, cut: int) -> None:
    store = Store(tmp_path / uuid.uuid4().hex)
    uri = f"cut://{package.folder}"
    everything = package.size_bytes + (package.folder / MANIFEST).stat().st_size
    line.reset(left=cut)
    with pytest.raises(ArtifactUnreachable, match="the line was cut"):
        store.fetch(uri, package.sha256)
    before = line.read
    line.reset()
    folder = store.fetch(uri, package.sha256)
    assert same(folder, package.folder)
    assert not (folder / PARTIAL).exists()
    assert before + line.read <= everything + (1 << 20) + 10, "one chunk may have been lost, no more"


def test_a_fetch_goes_on_within_the_file(store: Store, package: Package) -> None:
    line.reset(left=4 << 20)
    uri = f"cut://{package.folder}"
    with pytest.raises(ArtifactUnreachable, match=r"big\.bin cannot be read: the line was cut"):
        store.fetch(uri, package.sha256)
    line.reset()
    told: list[int] = []
    store.fetch(uri, package.sha256, progress=lambda done, total: told.append(done))
    assert line.read < 3 << 20
    assert told[-1] == package.size_bytes


def test_a_spoilt_beginning_is_thrown_away_once(tmp_path: Path, store: Store, package: Package) -> None:
    digest = package.manifest.files["weights/big.bin"].sha256
    partials = tmp_path / "store" / package.sha256 / PARTIAL
    partials.mkdir(parents=True)
    (partials / digest).write_bytes(b"\0" * (4 << 20))
    folder = store.fetch(f"cut://{package.folder}", package.sha256)
    assert same(folder, package.folder)
    assert line.read > BIG
    assert not partials.exists()


def test_a_server_without_ranges_is_read_from_the_start(
    tmp_path: Path, store: Store, package: Package
) -> None:
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(package.folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        digest = package.manifest.files["weights/big.bin"].sha256
        partials = tmp_path / "store" / package.sha256 / PARTIAL
        partials.mkdir(parents=True)
        (partials / digest).write_bytes((package.folder / "weights" / "big.bin").read_bytes()[: 1 << 20])
        folder = store.fetch(f"http://127.0.0.1:{server.server_port}", package.sha256)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert same(folder, package.folder)


FETCH = """
import sys, time
from pathlib import Path
from services.inference.store import Store

def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.05)

Store(Path(sys.argv[1])).fetch(sys.argv[2], sys.argv[3], progress=slowly)
"""


def test_a_fetch_that_was_killed_goes_on_where_it_was(tmp_path: Path, store: Store, package: Package) -> None:
    arguments = [str(tmp_path / "store"), f"file://{package.folder}", package.sha256]
    with subprocess.Popen(
        [sys.executable, "-c", FETCH, *arguments], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        for said in process.stdout:
            if int(said) > 3 << 20:
                break
        process.kill()
    folder = store.fetch(f"cut://{package.folder}", package.sha256)
    assert same(folder, package.folder)
    assert line.read < package.size_bytes - (2 << 20), "what the killed one had was not read again"


def test_a_store_that_is_closed_fetches_no_further(store: Store, package: Package) -> None:
    def close(done: int, total: int) -> None:
        if done > 1 << 20:
            store.close()

    with pytest.raises(ArtifactUnreachable, match="stopping"):
        store.fetch(package.uri, package.sha256, progress=close)


# --- at once


@pytest.mark.parametrize("root", ["file://{}/s", "memory://{}/s"])
def test_two_pushes_at_once_do_no_harm(root: str, tmp_path: Path, store: Store, package: Package) -> None:
    place = root.format(tmp_path)
    uris = in_threads(4, lambda: push(package.folder, place))
    assert len(set(uris)) == 1
    assert same(store.fetch(uris[0], package.sha256), package.folder)


def test_two_fetches_at_once_share_the_work(tmp_path: Path, package: Package) -> None:
    uri = f"cut://{package.folder}"
    folders = in_threads(4, lambda: Store(tmp_path / "shared").fetch(uri, package.sha256))
    assert same(folders[0], package.folder)
    assert line.read < 1.1 * package.size_bytes + 100_000


def in_threads(count: int, work: Callable[[], Any]) -> list[Any]:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == count
    return found


def test_the_lock_of_a_writer_that_was_killed_is_free(tmp_path: Path, package: Package) -> None:
    lock = tmp_path / "s" / ".locks" / package.sha256
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen(["flock", str(lock), "sleep", "60"], start_new_session=True)
    try:
        deadline = time.monotonic() + WAIT_S
        while subprocess.run(["flock", "-n", str(lock), "true"]).returncode == 0:
            assert time.monotonic() < deadline, "the lock is not held"
            time.sleep(0.02)
        pushed: list[str] = []
        thread = threading.Thread(target=lambda: pushed.append(push(package.folder, f"file://{tmp_path}/s")))
        thread.start()
        assert not (tmp_path / "s" / package.sha256).exists()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
    thread.join(WAIT_S)
    assert pushed


# --- broken


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_anywhere_is_found(tmp_path: Path, package: Package, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([MANIFEST, *(n for n, f in package.manifest.files.items() if f.size)]))
    with copied(tmp_path, package) as broken:
        path = broken / name
        position = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
        with path.open("r+b") as file:
            file.seek(position // 8)
            byte = file.read(1)[0]
            file.seek(position // 8)
            file.write(bytes([byte ^ 1 << position % 8]))
        with pytest.raises(ArtifactRefused, match=f"{name} is corrupt"):
            Store(broken.parent / "store").fetch(f"file://{broken}", package.sha256)
        assert not (broken.parent / "store" / package.sha256 / name).exists()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_that_are_shorter_longer_or_gone_are_found(
    tmp_path: Path, package: Package, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([MANIFEST, *package.manifest.files]))
    size = (package.folder / name).stat().st_size
    new = data.draw(st.none() | st.integers(0, size + 3).filter(lambda length: length != size))
    with copied(tmp_path, package) as broken:
        if new is None:
            (broken / name).unlink()
        else:
            os.truncate(broken / name, new)
        wrong = "cannot be read: there is no such file" if new is None else "is corrupt"
        with pytest.raises(ArtifactRefused, match=f"{name} {wrong}"):
            Store(broken.parent / "store").fetch(f"file://{broken}", package.sha256)


def test_what_the_manifest_does_not_name_stays_where_it_is(tmp_path: Path, package: Package) -> None:
    with copied(tmp_path, package) as more:
        (more / "extra.py").write_text("raise SystemExit\n")
        folder = Store(tmp_path / "store").fetch(f"file://{more}", package.sha256)
        assert not (folder / "extra.py").exists()
        uri = push(more, f"file://{tmp_path}/s")
    assert same(Path(uri.removeprefix("file://")), package.folder)


def test_a_source_that_changed_since_it_was_sealed_is_not_pushed(tmp_path: Path, package: Package) -> None:
    with copied(tmp_path, package) as changed:
        (changed / "model.py").write_text("import os\n")
        for place in (f"file://{tmp_path}/s", f"memory://{tmp_path}/s"):
            with pytest.raises(PushFailed, match=r"model\.py is corrupt: its SHA-256 is"):
                push(changed, place)
            assert not fsspec.core.url_to_fs(place)[0].exists(f"{tmp_path}/s/{package.sha256}/{MANIFEST}")
        (changed / "model.py").unlink()
        with pytest.raises(PushFailed, match=r"model\.py cannot be read: there is no such file"):
            push(changed, f"file://{tmp_path}/s")


@contextmanager
def copied(tmp_path: Path, package: Package) -> Iterator[Path]:
    home = tmp_path / uuid.uuid4().hex
    shutil.copytree(package.folder, home / "artifact")
    try:
        yield home / "artifact"
    finally:
        shutil.rmtree(home)


# --- no room, no permission


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs privileges: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_called_so(
    small_disk: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PushFailed, match=r"big\.bin cannot be written: the disk is full"):
        push(package.folder, f"file://{small_disk}/s")
    shutil.rmtree(small_disk / "s")
    store = Store(small_disk / "store")
    with pytest.raises(ArtifactUnreachable, match=r"the disk is full \(\d+ bytes needed, \d+ free\)"):
        store.fetch(package.uri, package.sha256)  # seen before it is tried
    monkeypatch.setattr(
        store_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 0, 1 << 60)
    )
    with pytest.raises(ArtifactUnreachable, match=r"cannot be kept in .*: the disk is full$"):
        store.fetch(package.uri, package.sha256)  # others were quicker
    assert shutil.os.statvfs(small_disk).f_bavail > 100, "what could not be finished takes no room"


def test_a_limit_on_files_is_called_so(tmp_path: Path, store: Store, package: Package) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(PushFailed, match="larger than files may be"):
            push(package.folder, f"file://{tmp_path}/s")
        with pytest.raises(ArtifactUnreachable, match="larger than files may be"):
            store.fetch(package.uri, package.sha256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_place_that_cannot_be_written_is_called_so(
    tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "AccessDenied", path)

    monkeypatch.setattr(CutFileSystem, "_open", refuse)  # root may do everything to real files
    with pytest.raises(PushFailed, match="permission denied"):
        push(package.folder, f"cut://{tmp_path}/s")
    with pytest.raises(PushFailed, match="cannot be written"):
        push(package.folder, "nonsense://x")
    with pytest.raises(PushFailed, match="is no artifact"):
        push(tmp_path, f"file://{tmp_path}/s")


# --- signed


def test_nothing_is_read_that_nobody_trusted_signed(tmp_path: Path, package: Package) -> None:
    signer, stranger = Signer.at(tmp_path / "a.pem"), Signer.at(tmp_path / "b.pem")
    (tmp_path / "trusted.pem").write_bytes(signer.public_pem)
    store = Store(tmp_path / "store", TrustedKeys.at(tmp_path / "trusted.pem"))
    uri, sha256 = f"cut://{package.folder}", package.sha256
    good = Artifact.at(package.folder).signed(signer, "m")
    bad = Artifact.at(package.folder).signed(stranger, "m")
    for model, artifact, why in (
        ("m", Artifact.at(package.folder), "not signed"),
        ("m", bad, "not among the trusted keys"),
        ("other", good, "signature is wrong"),
    ):
        with pytest.raises(ArtifactRefused, match=why) as caught:
            store.fetch(uri, sha256, model=model, signature=artifact.signature, signer=artifact.signer)
        assert not isinstance(caught.value, ArtifactUnreachable), "would be tried again"
    assert line.read == 0
    assert not (tmp_path / "store").exists()
    store.fetch(uri, sha256, model="m", signature=good.signature, signer=good.signer)
    Store(tmp_path / "store2").fetch(uri, sha256, model="m", signature=bad.signature, signer=bad.signer)
