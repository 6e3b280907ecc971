"""Who holds a port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

import psutil

from deploy.local.layout import HOST


def taken(ports: Mapping[int, str]) -> list[str]:
    """One sentence for each of `ports` (number → what it is for) that somebody listens on."""
    return [
        f"port {port} ({use}) is held by {_holder(port)}" for port, use in ports.items() if not _free(port)
    ]


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as err:
            return err.errno != errno.EADDRINUSE
    return True


def _holder(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            if connection.pid is None:
                break
            try:
                process = psutil.Process(connection.pid)
                command = " ".join(process.cmdline())[:80]
                return f"{process.name()} (pid {connection.pid}: {command})"
            except psutil.NoSuchProcess:
                break
    return "a process of another user"
