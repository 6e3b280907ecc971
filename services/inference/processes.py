"""The processes in which Triton's Python backend runs models: found on this host, seen dying, ended when they
hang.

Triton starts one per model instance, with the path of its model.py as the first argument. It neither tells
their process ids nor notices one that was killed before the next request comes to it. Where they cannot be
seen, because inference has a process namespace of its own, nothing is found and nothing is ended.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from services.core.discovery import VersionKey

STUB = "triton_python_backend_stub"
END_WAIT_S = 5.0


class Processes:
    """Of the models in one repository folder. All methods block a little."""

    def __init__(self, repository: Path) -> None:
        self._root = repository.resolve()

    def of(self, key: VersionKey) -> list[psutil.Process]:
        """Those that run the version now."""
        model = str(self._root / key.model / str(key.version) / "model.py")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if len(command) > 1 and command[1] == model and Path(command[0]).name == STUB:
                    found.append(process)
        return found


def ended(process: psutil.Process) -> bool:
    """Also if another one has its id by now."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stopped(process: psutil.Process) -> bool:
    """By a signal or a debugger."""
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, which ends a stopped process as well."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def end(processes: list[psutil.Process], wait_s: float = END_WAIT_S) -> None:
    """Kill what is still there after `wait_s`."""
    _, left = psutil.wait_procs([p for p in processes if not ended(p)], timeout=wait_s)
    kill(left)
