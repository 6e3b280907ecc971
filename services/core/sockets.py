"""Ports that belong to one process."""

from __future__ import annotations

import socket

# After how long a peer that says nothing is asked whether it is there, how often, and how many times, s.
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}


def bound(listen: str) -> socket.socket:
    """A socket on "host:port". Raises OSError if it is taken."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Told to be TCP's, or asyncio leaves Nagle's algorithm on, and with it 40 ms between two windows.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # Not SO_REUSEPORT: a taken port is an error, not a shared one.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it: those of a machine that has vanished would be kept for ever.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        made.bind((host, int(port)))
    except OSError as err:
        made.close()
        raise OSError(f"cannot listen on {listen}: {err}") from err
    return made
