"""Which part of a machine each of several Tritons gets: a GPU, or a memory node's processors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NODES = Path("/sys/devices/system/node")
GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Share:
    """`prefix` goes before a command line, `env` into its environment."""

    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def share(number: int, of: int, nodes: Path = NODES, gpus: Path = GPUS) -> Share:
    """What the Triton `number`, from 1, of so many gets. One alone gets everything. The n-th has the n-th
    GPU, in turn; without GPUs the processors of the n-th memory node, in turn, if there are several."""
    if of == 1:
        return Share()
    if count := len(list(gpus.iterdir())) if gpus.is_dir() else 0:
        visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
        choice = visible or [str(index) for index in range(count)]
        return Share(env={"CUDA_VISIBLE_DEVICES": choice[(number - 1) % len(choice)]})
    lists = [path for path in sorted(nodes.glob("node[0-9]*/cpulist")) if path.read_text().strip()]
    taskset = shutil.which("taskset")
    if len(lists) < 2 or taskset is None:
        return Share()
    return Share((taskset, "--cpu-list", lists[(number - 1) % len(lists)].read_text().strip()))
