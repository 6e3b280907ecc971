"""The session of an inference process with a text model in a real Triton, without the rest of a suite."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from deploy.local import layout as at
from deploy.local.layout import Layout
from deploy.local.part import Running
from deploy.local.parts import triton_server
from pipeline.bundled import TEXT_MODEL
from services.core.discovery import VersionKey
from services.inference.artifact import Manifest
from services.inference.backends.jobs import Sampling
from services.inference.repository import Repository
from services.inference.session import Session
from services.inference.triton import Triton
from tests.conftest import free_offset, show_logs
from tests.waiting import until

KEY = VersionKey(TEXT_MODEL, 1)


@pytest.mark.soak  # a load of the model; that a suite stops so is in tests/chaos/test_kills.py
async def test_triton_lets_go_of_a_text_model_whose_session_has_ended(
    tmp_path: Path, artifacts: dict[str, Path]
) -> None:
    """When it is unloaded, and with it of its memory, and when Triton is stopped: it waits for every request
    that was not answered to the end, for as long as --exit-timeout-secs."""
    layout = Layout(tmp_path, free_offset())
    running = await Running.start(triton_server(layout), layout.logs)
    triton = Triton(layout.address(at.TRITON_GRPC))
    try:
        await running.until_ready()
        parameters = {"otlp_endpoint": "", "kv_cache_gib": "1", "max_sequences": "16"}
        repository = Repository(layout.state / "triton" / "models", parameters)
        folder = artifacts[TEXT_MODEL]
        repository.add(KEY, folder, Manifest.read(folder))
        await triton.load(TEXT_MODEL)
        session = Session(triton, KEY, repository.secret, 16)
        steps = [step async for step in session.generate([1, 2, 3], Sampling(max_tokens=3))]
        assert sum(len(step.tokens) for step in steps) == 3
        assert len(_models(running.pid)) == 1
        await session.close()
        await triton.unload(TEXT_MODEL)
        await until(lambda: not _models(running.pid), "the model's process has ended", timeout_s=5)
        log = (layout.logs / "triton.log").read_text()
        assert f"successfully unloaded '{TEXT_MODEL}'" in log
    finally:
        await triton.close()
        await running.stop()
        show_logs(layout)


def _models(pid: int) -> list[int]:
    """The processes of a Triton's models."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("triton_python"):
                found.append(process.pid)
    return found
