"""Finds a port for a server that has to come back on it: no other process may take it meanwhile."""

import os
import socket

# Below those that the kernel gives to whoever asks for any port (from 32768 on). Test processes
# that run side by side begin at different ones.
FIRST = 20_000 + os.getpid() % 10_000
LAST = 32_767


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    for port in range(FIRST, LAST):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"all ports from {FIRST} to {LAST} are taken")
