"""What tests share: free ports, real parts as child processes, and one running suite for a session."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer

from bench import suite as suites
from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import etcd
from pipeline.bundled import TEXT_MODEL, bundled

# How long an example takes says how busy the machine is.
settings.register_profile("lingqu", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lingqu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-goldens", action="store_true", help="golden snapshots are what they are now")


# The longest first, so that no worker begins one of them when the others have come to the end.
FOLDERS = ("chaos", "e2e", "integration", "contract", "unit")


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which looks for the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What soaks takes minutes: only where it is asked for (`make soak`). With several workers, whatever uses
    the one running suite is for one of them, and otherwise a file at a time."""
    items.sort(key=lambda item: FOLDERS.index(item.path.parent.name))
    for item in items:
        shared = "suite" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("suite" if shared else item.nodeid.partition("::")[0]))
    if "soak" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """A name of megabytes would go with each report of its test, and one with a time in it is another one for
    each worker."""
    return f"{argname} of {len(val)}" if isinstance(val, bytes | str) and len(val) > 60 else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that xdist does not see it ignores without a word, and every worker starts every part."""
    grouped = getattr(session.config.option, "loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("xdist does not see the groups of tests (tests/conftest.py)")


ALL_PORTS = (
    *(at.PUBLIC, at.GATEWAY, at.REGISTRY, at.INFERENCE, at.INFERENCE_HTTP),
    *(at.TRITON_HTTP, at.TRITON_GRPC, at.TRITON_METRICS, at.METRICS, at.METRICS_HTTP),
    *(at.ETCD, at.ETCD_PEER, at.ENVOY_ADMIN),
)
# A worker's offsets end in digits of its own, with which no port of one is a port of another; all are below
# those that the system gives to clients.
LAST_DIGITS = (0, 5, 31, 57)
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
HUNDREDS = range(20, 225)
_begin = os.getpid() % len(HUNDREDS)
_hundreds = itertools.cycle((*HUNDREDS[_begin:], *HUNDREDS[:_begin]))


def free_offset() -> int:
    """An offset at which every port of a suite is free, another one each time."""
    for hundreds in itertools.islice(_hundreds, len(HUNDREDS)):
        offset = 100 * hundreds + LAST_DIGITS[WORKER % len(LAST_DIGITS)]
        if all(_free(base + offset) for base in ALL_PORTS):
            return offset
    raise AssertionError("no ports are free for a suite")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((at.HOST, port)) != 0


@pytest.fixture(scope="session")
def artifacts() -> dict[str, Path]:
    """Folders of the bundled artifacts by model."""
    return {item.name: item.package.folder for item in bundled(print)}


@pytest.fixture(scope="session")
def tokenizer(artifacts: dict[str, Path]) -> Tokenizer:
    """The text model's own."""
    return Tokenizer.from_file(str(artifacts[TEXT_MODEL] / "tokenizer.json"))


@pytest.fixture(scope="session")
async def suite() -> AsyncIterator[suites.Suite]:
    """A whole suite with the bundled models, for tests that leave it as they found it."""
    async with suites.running(free_offset()) as running:
        try:
            yield running
        finally:
            show_logs(running.layout)


@pytest.fixture
async def etcd_server(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    server = EtcdServer(Layout(tmp_path, free_offset()))
    await server.start()
    yield server
    await server.stop()


class EtcdServer:
    """A real etcd that tests may kill and start again on the same data."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._running: Running | None = None

    @property
    def address(self) -> str:
        return self.layout.address(at.ETCD)

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    async def start(self) -> None:
        self._running = await Running.start(etcd(self.layout), self.layout.logs)
        await self._running.until_ready()

    async def stop(self) -> None:
        if self._running is not None:
            await self._running.stop()
            self._running = None

    async def kill(self) -> None:
        assert self._running is not None
        os.kill(self._running.pid, 9)
        await self._running.ended()
        self._running = None


def missing(what: str) -> NoReturn:
    """Skip a test for which this machine lacks something; fail where everything has to be there (CI=true)."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


def show_logs(layout: Layout, lines: int = 15) -> None:
    """The end of every log, for pytest to show when something failed."""
    for log in sorted(layout.logs.glob("*.log")):
        print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-lines:], sep="\n")  # noqa: T201


@pytest.fixture(autouse=True, scope="session")
def offline() -> None:
    """No test may wait for a hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
