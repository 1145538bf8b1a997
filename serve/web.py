"""What our servers over HTTP have in common: where they listen, who may ask, and for how long.

Used by mcp_server.py and retrieve.py. An ASGI application is served by uvicorn, in one process.
"""

import hmac
import json
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from run.config import UserError
from run.http import is_on_this_machine, key_from

REQUEST_SECONDS = 20.0  # that a request, its head and its body, has to arrive


class ImpatientProtocol(H11Protocol):
    """Closes a connection over which no whole request comes in time: uvicorn waits for ever, and
    each costs a descriptor. What is there already is answered, however long that takes."""

    deadline = None  # a timer, while a request is waited for

    def connection_made(self, transport):
        super().connection_made(transport)
        self._wait()

    def data_received(self, data):
        super().data_received(data)
        is_waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not is_waiting:
            self._stop_waiting()
        elif self.deadline is None:
            self._wait()

    def connection_lost(self, exc):
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self):
        self.deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _stop_waiting(self):
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def settings(app) -> uvicorn.Config:
    """Of the server, whatever it serves."""
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,  # clients keep a stream open for ever
    )


def serve(app, listening: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    uvicorn.Server(settings(app)).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0 is any free one. UserError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)  # who comes before it is ready waits
    except OSError as error:
        where = f"{host}:{port}"
        raise UserError(
            f"cannot listen at {where} ({error.strerror}): give another --port"
        ) from None
    return listening


def address(listening: socket.socket) -> str:
    """http://host:port"""
    host, port = listening.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


# -- who may ask


def is_loopback(host: str) -> bool:
    """Only those names of this machine for which a request's Host is looked at, too."""
    return host in ("127.0.0.1", "localhost", "::1")


def require_token(host: str, token_env: str) -> None:
    """UserError where other machines are let in and nothing is asked of them."""
    if not key_from(token_env) and not is_loopback(host):
        raise UserError(
            f"host = {host!r} lets other machines in: set the environment variable "
            f"{token_env} to a token, or serve 127.0.0.1"
        )


def has_token(headers: list, token: str) -> bool:
    """Whether a request carries the bearer token; if there is none, anything does."""
    if not token:
        return True
    authorization = dict(headers).get(b"authorization", b"")
    scheme, _, value = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(value.strip(), token.encode())


async def refuse_token(send) -> None:
    wrong = {"error": "a bearer token is missing or wrong"}
    await answer(send, 401, wrong, [(b"www-authenticate", b"Bearer")])


def names_loopback(headers: list) -> bool:
    """Whether a request's Host is this machine. A web page whose name server sends it to 127.0.0.1
    (DNS rebinding) says its own name there."""
    written = dict(headers).get(b"host", b"").decode("latin-1")
    try:
        return is_on_this_machine(f"http://{written}")
    except ValueError:  # not even an address
        return False


async def answer(send, status: int, value, headers=()) -> None:
    """Answers with JSON, or with a text as it is."""
    kind = b"application/json"
    body = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
    if isinstance(value, str):
        kind = b"text/plain; version=0.0.4; charset=utf-8"
    length = str(len(body)).encode()
    headers = [(b"content-type", kind), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
