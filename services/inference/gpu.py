"""The NVIDIA GPUs of this machine, asked of NVML (nvidia-ml-py) or of nvidia-smi; none where neither is."""

from __future__ import annotations

import csv
import importlib
import logging
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,driver_version,memory.total",
    "--format=csv,noheader,nounits",
)
ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """`capability` is "8.9", `cuda` the newest version that the driver supports, "" if it was not told."""

    name: str
    capability: str
    driver: str
    memory_bytes: int
    cuda: str = ""

    @property
    def fingerprint(self) -> str:
        """What an engine is built for: "gpu-nvidia-l4-sm89". At most 200 characters."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"gpu-{name}-sm{self.capability.replace('.', '')}"[:200]


def gpus(
    load: Callable[[str], Any] = importlib.import_module,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> tuple[Gpu, ...]:
    """In the driver's order. Never raises: a machine whose driver does not answer has no GPUs for us."""
    try:
        nvml = load("pynvml")
    except ImportError:
        return _by_command(run)
    try:
        return _by_nvml(nvml)
    except nvml.NVMLError as err:
        log.info("NVML: %s; no GPUs", err)
        return ()


def _by_nvml(nvml: Any) -> tuple[Gpu, ...]:
    nvml.nvmlInit()
    try:
        driver, cuda = _text(nvml.nvmlSystemGetDriverVersion()), nvml.nvmlSystemGetCudaDriverVersion()
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            name = _text(nvml.nvmlDeviceGetName(handle))
            found.append(Gpu(name, f"{major}.{minor}", driver, memory, f"{cuda // 1000}.{cuda % 1000 // 10}"))
        return tuple(found)
    finally:
        nvml.nvmlShutdown()


def _by_command(run: Callable[..., subprocess.CompletedProcess[str]]) -> tuple[Gpu, ...]:
    try:
        answer = run(QUERY, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=True)
        rows = [[cell.strip() for cell in row] for row in csv.reader(answer.stdout.splitlines()) if row]
        return tuple(Gpu(name, capability, driver, int(mib) << 20) for name, capability, driver, mib in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _text(value: str | bytes) -> str:
    """Older bindings answer bytes."""
    return value.decode() if isinstance(value, bytes) else value
