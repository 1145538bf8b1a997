"""What our servers over HTTP have in common: where they listen, who may ask, and for how long.

Used by mcp_server.py, retrieve.py and agent.py. An ASGI application is served by uvicorn, in one
process.
"""

import hmac
import json
import signal
import socket

import h11
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from run.config import UserError
from run.http import is_on_this_machine, key_from
from run.loop import Running

REQUEST_SECONDS = 20.0  # that a request, its head and its body, has to arrive
# A body of up to so many times what is allowed is read to its end and thrown away: where a server
# closes with bytes unread, the system throws away its answer, and the client sees a reset.
READ_AWAY = 4


class Refused(Exception):
    """A request that is answered by a status of HTTP and a sentence. param, code: what of it is
    wrong, and how, in the errors of OpenAI's API."""

    def __init__(self, status: int, why: str, param: str | None = None, code: str | None = None):
        super().__init__(why)
        self.status = status
        self.why = why
        self.param = param
        self.code = code


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
    """Makes the settings of the server, whatever it serves."""
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


def serve_on_loop(app, listening: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C, as `serve` does, on the one event loop on which engines and
    tools are (run/loop.py)."""
    server = uvicorn.Server(settings(app))

    def end(*_):
        server.force_exit = server.should_exit  # the second time, without waiting for anybody
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    Running(server.serve(sockets=[listening])).result()


async def live(receive, send) -> None:
    """Answers the lifespan of an application; returns when the server ends."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "lifespan.startup.complete"})


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket at that address; port 0 is any free one. UserError if it is taken."""
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
    """Writes http://host:port"""
    host, port = listening.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


# -- who may ask


def is_loopback(host: str) -> bool:
    """Says whether it is a name of this machine for which a request's Host is looked at, too."""
    return host in ("127.0.0.1", "localhost", "::1")


def require_token(host: str, token_env: str) -> None:
    """Refuses to let other machines in and ask nothing of them."""
    if not key_from(token_env) and not is_loopback(host):
        raise UserError(
            f"host = {host!r} lets other machines in: set the environment variable "
            f"{token_env} to a token, or serve 127.0.0.1"
        )


def has_token(headers: list, token: str) -> bool:
    """Says whether a request carries the bearer token; if there is none, anything does."""
    if not token:
        return True
    authorization = dict(headers).get(b"authorization", b"")
    scheme, _, value = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(value.strip(), token.encode())


def has_token_of_browser(request: Request, cookie: str, token: str, in_link: bool) -> bool:
    """Says whether a browser, which sends no header of ours, shows the token: in its cookie, or,
    where links have it, as ?token=…"""
    linked = request.query_params.get("token", "") if in_link else ""
    given = linked or request.cookies.get(cookie, "")
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def cookie_name(scope, server: str) -> str:
    """Names a cookie: cookies do not know ports, so each server of this machine has its own."""
    return f"nanotool_{server}_{scope['server'][1]}"


def set_token(response: Response, cookie: str, token: str, path: str) -> None:
    """Has the browser keep the token, where neither a script nor another site gets it."""
    response.set_cookie(cookie, token, httponly=True, samesite="strict", path=path)


async def refuse_token(send) -> None:
    wrong = {"error": "a bearer token is missing or wrong"}
    await answer(send, 401, wrong, [(b"www-authenticate", b"Bearer")])


def names_loopback(headers: list) -> bool:
    """Says whether a request's Host is this machine. A web page whose name server sends it to
    127.0.0.1 (DNS rebinding) says its own name there."""
    written = dict(headers).get(b"host", b"").decode("latin-1")
    try:
        return is_on_this_machine(f"http://{written}")
    except ValueError:  # not even an address
        return False


def is_of_other_origin(headers: list) -> bool:
    """Says whether a request comes from a web page that this server did not serve."""
    headers = dict(headers)
    origin = headers.get(b"origin")
    host = headers.get(b"host", b"")
    return origin is not None and origin not in (b"http://" + host, b"https://" + host)


# -- requests and answers


async def read_body(scope, receive, most: int) -> bytes:
    """Reads the body of a request. Raises Refused if it has more than `most` bytes, or its sender
    has gone."""
    too_large = Refused(413, f"a request has at most {most} bytes")
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    said = int(length) if length.isdigit() else 0
    waits = headers.get(b"expect", b"").lower() == b"100-continue"  # with its body, for our word
    if said > READ_AWAY * most or (said > most and waits):
        raise too_large
    body = bytearray()
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request did not come to its end")
        part = message.get("body", b"")
        size += len(part)
        if size <= most:
            body += part
        elif size > READ_AWAY * most:
            raise too_large
        if not message.get("more_body"):
            if size > most:
                raise too_large
            return bytes(body)


def prometheus(prefix: str, metrics, counters: list[str]) -> str:
    """Writes a dataclass's numbers in the text that Prometheus reads. counters: those that grow."""
    lines = []
    for name, value in vars(metrics).items():
        is_counter = name in counters
        full_name = f"{prefix}_{name}{'_total' if is_counter else ''}"
        lines.append(f"# TYPE {full_name} {'counter' if is_counter else 'gauge'}")
        lines.append(f"{full_name} {value}")
    return "\n".join(lines) + "\n"


async def answer(send, status: int, value, headers=(), kind: bytes = b"") -> None:
    """Answers with JSON, or with a text as it is, of the content type `kind`."""
    if isinstance(value, str):
        body = value.encode()
        kind = kind or b"text/plain; version=0.0.4; charset=utf-8"
    else:
        body = json.dumps(value).encode()
        kind = b"application/json"
    length = str(len(body)).encode()
    headers = [(b"content-type", kind), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
