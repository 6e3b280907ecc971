"""Builds plans in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from services.inference.tensorrt.plan import BuildFailed, Recipe

TIMEOUT_S = 3600.0
MAX_SAID = 400


class SubprocessBuilder:
    """`command` is what runs build.py, with its arguments to be appended."""

    def __init__(
        self,
        command: tuple[str, ...] = (sys.executable, "-m", "services.inference.tensorrt.build"),
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._command = command
        self._timeout_s = timeout_s

    @property
    def version(self) -> str:
        try:
            return metadata.version("tensorrt")
        except metadata.PackageNotFoundError:
            return ""

    def build(self, onnx: Path, plan: Path, recipe: Recipe) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(asdict(recipe), file)
            file.flush()
            try:
                done = subprocess.run(
                    [*self._command, str(onnx), str(plan), file.name],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self._timeout_s,
                )
            except subprocess.TimeoutExpired as err:
                raise BuildFailed(f"TensorRT did not end within {self._timeout_s:.0f} s") from err
        if done.returncode:
            said = done.stderr.strip().splitlines()
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise BuildFailed(f"TensorRT: {said[-1][:MAX_SAID] if said else how}")
