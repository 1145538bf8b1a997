"""Bytes to a server as they are, which no HTTP client would send."""

import socket
import threading
from contextlib import suppress

from until import PATIENCE


def exchanged(port: int, sent: bytes) -> bytes:
    """What comes back for these bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        # a server may answer, and close, before it has read what is too large
        sender = threading.Thread(target=_send, args=(connection, sent), daemon=True)
        sender.start()
        received = b""
        with suppress(ConnectionError, TimeoutError):
            while chunk := connection.recv(65536):
                received += chunk
        sender.join(PATIENCE)
    return received


def _send(connection: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError, TimeoutError):
        connection.sendall(data)
