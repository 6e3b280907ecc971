"""Processes that are measured, found by what they listen on."""

from __future__ import annotations

import psutil


def listener_on(port: int) -> psutil.Process:
    """Whoever listens on that port. Raises ProcessLookupError."""
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid:
            return psutil.Process(found.pid)
    raise ProcessLookupError(f"nobody listens on port {port}")
