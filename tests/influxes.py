"""A real InfluxDB of its own for a test, which may kill it and start it again on the same data."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.metrics.stores.influxhttp import Server
from tests.conftest import missing

READY_S = 20.0
CONFIG = """
reporting-disabled = true
bind-address = "127.0.0.1:{backup}"
[meta]
dir = "{folder}/meta"
[data]
dir = "{folder}/data"
wal-dir = "{folder}/wal"
[http]
bind-address = "127.0.0.1:{port}"
log-enabled = false
auth-enabled = {auth}
[monitor]
store-enabled = false
[continuous_queries]
enabled = false
"""


class Influx:
    """`prefix` comes before the command, as `prlimit` does."""

    def __init__(self, folder: Path, *, auth: bool = False, prefix: tuple[str, ...] = ()) -> None:
        self.folder, self._prefix = folder, prefix
        self.port, backup = _free_port(), _free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._log = folder / "influx.conf", folder / "influx.log"
        text = CONFIG.format(folder=folder, port=self.port, backup=backup, auth=str(auth).lower())
        self._config.write_text(text)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def server(self, database: str = "") -> Server:
        """A database of its own, if none is named."""
        return Server(self.url, database or f"t{uuid.uuid4().hex[:10]}")

    def start(self) -> None:
        binary = shutil.which("influxd") or missing("influxd (apt-get install influxdb)")
        with self._log.open("ab") as log:
            argv = (*self._prefix, binary, "-config", str(self._config))
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + READY_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise AssertionError(
                    f"influxd did not start:\n{self._log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.02)

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.request("GET", "/ping")
            return connection.getresponse().status == 204
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, sign: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def influx(folder: Path, *, auth: bool = False, prefix: tuple[str, ...] = ()) -> Iterator[Influx]:
    made = Influx(folder, auth=auth, prefix=prefix)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
