"""How much memory this process's machine, or its container, has left."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63


def available_bytes(cgroup: Path = CGROUP) -> int:
    """What new work can have without others losing theirs: the least of what the machine has available and
    of what the control group (v2 or v1) leaves. Caches of files count as available, as for the kernel."""
    found = int(psutil.virtual_memory().available)
    limit = _number(cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes")
    used = _number(cgroup / "memory.current", cgroup / "memory" / "memory.usage_in_bytes")
    if limit is not None and used is not None and limit < UNLIMITED:
        found = min(found, max(0, limit - used + _file_cache(cgroup)))
    return found


def _file_cache(cgroup: Path) -> int:
    """Bytes of files in memory that the kernel would give back first."""
    for name in ("memory.stat", "memory/memory.stat"):
        try:
            lines = (cgroup / name).read_text().splitlines()
        except OSError:
            continue
        fields = dict(line.split() for line in lines if len(line.split()) == 2)
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return 0


def _number(*places: Path) -> int | None:
    for place in places:
        try:
            return int(place.read_text())
        except (OSError, ValueError):  # "max" is no number: there is no limit
            continue
    return None
