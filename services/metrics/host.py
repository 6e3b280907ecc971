"""What this machine does: processors, memory, disk, network, and GPUs by NVML where there are any."""

from __future__ import annotations

import importlib
import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from services.metrics.readings import Kind, Reading

log = logging.getLogger(__name__)

HOST = "host"
GPU = "gpu"


class Host:
    """`cpu` is the share of all processors since the reading before, 0 to 1; bytes of disk and network are
    what was added. `folder` is where the store is: `disk_used` and `disk_total` are of its file system."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self._folder = folder
        self._name = name or platform.node()
        self._before: Mapping[str, float] = {}
        self._times = _times()

    def readings(self) -> list[Reading]:
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        times = _times()
        busy, passed = (after - before for after, before in zip(times, self._times, strict=True))
        self._times = times
        fields = {
            "cpu": min(1.0, max(0.0, busy / passed)) if passed > 0 else 0.0,
            "load": psutil.getloadavg()[0],
            "memory_used": float(memory.total - memory.available),
            "memory_total": float(memory.total),
            "disk_used": float(disk.used),
            "disk_total": float(disk.total),
        }
        now = self._totals()
        fields |= {
            name: value - self._before[name]
            for name, value in now.items()
            if value >= self._before.get(name, float("inf"))
        }
        self._before = now
        return [Reading(HOST, {"host": self._name}, fields, time.time_ns(), Kind.LEVEL)]

    @staticmethod
    def _totals() -> dict[str, float]:
        """Containers may see no disk or network at all."""
        totals: dict[str, float] = {}
        if (disk := psutil.disk_io_counters()) is not None:
            totals |= {"disk_read": float(disk.read_bytes), "disk_written": float(disk.write_bytes)}
        if (network := psutil.net_io_counters()) is not None:
            totals |= {
                "network_received": float(network.bytes_recv),
                "network_sent": float(network.bytes_sent),
            }
        return totals


def _times() -> tuple[float, float]:
    """Processor seconds that were used, and all that passed. (psutil.cpu_percent remembers by thread.)"""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # The kernel counts the time of guests as that of users, too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - idle, total


class Gpus:
    """The GPUs of this machine. `utilization` is a share, 0 to 1; memory in bytes, `temperature` in °C,
    `power` in W. What a GPU does not tell is left out; a driver that fails is asked again next time."""

    def __init__(self, name: str = "", load: Callable[[str], Any] = importlib.import_module) -> None:
        self._name = name or platform.node()
        self._load = load
        self._nvml: Any = None
        self._absent = False

    def readings(self) -> list[Reading]:
        if self._absent:
            return []
        try:
            nvml = self._load("pynvml")
        except ImportError:
            self._absent = True
            return []
        try:
            if self._nvml is None:
                nvml.nvmlInit()
                self._nvml = nvml
            found = [self._of(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as err:
            log.info("NVML: %s; no figures of GPUs", err)
            self.close()
            return []
        return [reading for reading in found if reading.fields]

    def _of(self, nvml: Any, index: int) -> Reading:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(handle)
        fields: dict[str, float] = {}

        def ask(read: Callable[[], dict[str, float]]) -> None:
            try:
                fields.update(read())
            except nvml.NVMLError as err:
                log.debug("GPU %d does not tell: %s", index, err)

        def memory() -> dict[str, float]:
            told = nvml.nvmlDeviceGetMemoryInfo(handle)
            return {"memory_used": float(told.used), "memory_total": float(told.total)}

        ask(lambda: {"utilization": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100})
        ask(memory)
        ask(lambda: {"temperature": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))})
        ask(lambda: {"power": nvml.nvmlDeviceGetPowerUsage(handle) / 1000})
        labels = {
            "host": self._name,
            "gpu": str(index),
            "name": name if isinstance(name, str) else name.decode(),
        }
        return Reading(GPU, labels, fields, time.time_ns(), Kind.LEVEL)

    def close(self) -> None:
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as err:
                log.debug("NVML: %s", err)
