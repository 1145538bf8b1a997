"""Requests over HTTP whose answers are JSON: addresses, keys, and what can go wrong.

Everything asynchronous runs on one event loop (run/loop.py), so connections are kept between calls.
"""

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx2 as httpx

from run.config import UserError

# What a server answers that is busy, or for a moment away: worth asking again.
TEMPORARY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# seconds; the deadline of a call is usually shorter, and that nobody is there is known soon
PATIENCE = httpx.Timeout(600.0, connect=10.0)
UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)
QUOTED = 300  # characters of an answer that stand in an error
LONGEST_WAIT = 60.0  # seconds, whatever a server wants
BIGGEST = 64 * 2**20  # bytes of an answer: more is never read, whoever sends it


class HttpError(Exception):
    """A request without an answer that can be used.

    kind: "key_unsendable", "unreachable", "busy", "key_refused", "refused", or "nonsense" (an
    answer, but not the JSON that was wanted). detail: a line for messages, which never has the key
    in it. text: the whole answer. retry_after: seconds that the server wants to be left alone.
    status: of HTTP, 0 if there is no answer.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        text: str = "",
        retry_after: float = 0.0,
        status: int = 0,
    ):
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.text = text
        self.retry_after = retry_after
        self.status = status


@dataclass
class Answer:
    """What a server answered, whole and no larger than BIGGEST."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> dict | list | str | int | float | bool | None:
        """Reads the value of its JSON. HttpError, nonsense, if it has none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            detail = f"an answer that is not JSON: {one_line(self.text)}"
            raise HttpError("nonsense", detail, self.text, status=self.status) from None


def one_line(text: str, limit: int = QUOTED) -> str:
    """Cuts an answer to its beginning, in one line, to be quoted in a message."""
    return " ".join(text.split())[:limit]


def address_problem(url: str, expected: str = "http(s)://host/path") -> str:
    """Says what is wrong with the address of a server; "" if nothing is."""
    if not url.startswith(("http://", "https://")):
        return f"expected {expected}"
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        return str(error)
    return ""


def is_on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def key_from(variable: str) -> str:
    """Reads a key from an environment variable; "" for none, and if `variable` is ""."""
    if not variable:
        return ""
    return os.environ.get(variable, "").strip()  # of a file with CRLF, a CR stays


def required_key(url: str, variable: str, owner: str) -> str:
    """Reads the key for a server from an environment variable.

    "" if there is none: a server on this machine may do without, and so may one for which
    `variable` is "". owner: what has the options url and key_env, "ask" or such. UserError if the
    key is missing.
    """
    key = key_from(variable)
    if variable and not key and not is_on_this_machine(url):
        way_out = f"export {variable}=..., or give {owner}.key_env= if it wants none"
        raise UserError(f"{owner}.url = {url!r} needs a key, and {variable} is not set: {way_out}")
    return key


def bearer(key: str) -> dict[str, str]:
    """Makes the headers that carry a key; none for ""."""
    if not key:
        return {}
    return {"Authorization": f"Bearer {key}"}


@contextlib.contextmanager
def failures_explained():
    """Turns what httpx raises into an HttpError."""
    try:
        yield
    except httpx.LocalProtocolError:  # its text quotes the key
        raise HttpError("key_unsendable", "the key cannot be sent") from None
    except UnicodeEncodeError as error:
        if error.encoding != "ascii":  # the body's: headers, where keys are, have to be ASCII
            raise
        raise HttpError("key_unsendable", "the key cannot be sent") from None
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise HttpError("unreachable", f"{type(error).__name__} {error}".strip()) from None


def check_status(answer: Answer) -> None:
    """Refuses, with HttpError, an answer that has not status 200."""
    status = answer.status
    if status == 200:
        return
    if status in TEMPORARY:
        kind = "busy"
    elif status in (401, 403):
        kind = "key_refused"
    else:
        kind = "refused"
    detail = f"HTTP {status}: {one_line(answer.text)}"
    if 300 <= status < 400:
        detail = f"HTTP {status}: it has moved to {answer.headers.get('location', '?')}"
    raise HttpError(kind, detail, answer.text, _retry_after(answer), status)


def _retry_after(answer: Answer) -> float:
    """Reads after how many seconds the server wants to be asked again; 0 if it says no number."""
    header = answer.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        return 0.0
    return min(LONGEST_WAIT, seconds) if seconds > 0 else 0.0  # NaN is not


async def read_answer(client: httpx.AsyncClient, method: str, url: str, **content) -> Answer:
    """Sends a request and reads the answer to it. HttpError, nonsense, if that is larger than
    BIGGEST. content: what httpx calls so; `json` is written here, as UTF-8 that can be sent: in the
    place of a lone surrogate, which JSON can spell, stands a question mark."""
    if "json" in content:
        try:
            text = json.dumps(content.pop("json"), ensure_ascii=False)
        except (ValueError, RecursionError) as error:
            raise HttpError("refused", f"it cannot be sent as JSON ({error})") from None
        content["content"] = text.encode("utf-8", "replace")
        content["headers"] = {"content-type": "application/json"} | content.get("headers", {})
    body = bytearray()
    async with client.stream(method, url, **content) as answer:
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > BIGGEST:
                detail = f"an answer of more than {BIGGEST >> 20} MiB"
                raise HttpError("nonsense", detail, status=answer.status_code)
    return Answer(answer.status_code, answer.headers, bytes(body))


class HttpClient:
    """Asks servers for JSON, and keeps the connections to them between requests."""

    def __init__(self, headers: dict[str, str] | None = None):
        """headers: of every request."""
        self.headers = headers or {}
        self._connections = None  # made at first use: its TLS context takes longer than a request

    @property
    def connections(self) -> httpx.AsyncClient:
        if self._connections is None:
            self._connections = httpx.AsyncClient(
                headers=self.headers, timeout=PATIENCE, limits=UNLIMITED
            )
        return self._connections

    async def request(
        self, method: str, url: str, **content
    ) -> dict | list | str | int | float | bool | None:
        """Sends a request; returns the server's answer, from JSON. content: headers, params and
        json of the request. HttpError if there is none that can be used."""
        with failures_explained():
            answer = await read_answer(self.connections, method, url, **content)
        check_status(answer)
        return answer.json()

    async def close(self) -> None:
        if self._connections is not None:
            await self._connections.aclose()


# -- what anybody may have written: an address that must not lead into our own network

REDIRECTS = 5  # that are followed
FETCHING = 30.0  # seconds, for all of it, where nobody says otherwise


def is_public(address: str) -> bool:
    """Says whether an IP address is one of the internet, not of this machine or its network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        # an IPv4 address inside of an IPv6 one: mapped, of 6to4, Teredo, or behind NAT64
        if ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in NAT64:
            return False
    return ip.is_global and not ip.is_multicast


NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch_public(
    url: str,
    limit: int,
    allowed: Callable[[str], bool] = is_public,
    seconds: float = FETCHING,
) -> bytes:
    """Fetches what is at a URL of the internet, `limit` bytes at most, following redirects.

    Each host is looked up once and connected to at the address that was checked: what its name
    server says next does not count. allowed: whether an IP address may be asked. seconds: for all
    of it. HttpError.
    """
    deadline = time.monotonic() + seconds
    patience = httpx.Timeout(10.0)
    with httpx.Client(timeout=patience, trust_env=False, follow_redirects=False) as client:
        for _ in range(REDIRECTS + 1):
            with failures_explained():
                answer = _fetch_once(client, url, limit, allowed, deadline)
            location = answer.headers.get("location")
            if not (300 <= answer.status < 400 and location):
                check_status(answer)
                return answer.body
            url = urljoin(url, location)
    raise HttpError("refused", f"it was redirected more than {REDIRECTS} times")


def _fetch_once(client, url, limit, allowed, deadline):
    """Sends one request, to the address that was checked."""
    problem = address_problem(url)
    if problem:
        raise HttpError("refused", f"{one_line(url, 80)!r} is no address: {problem}")
    parts = httpx.URL(url)
    address = _checked_address(parts.host, allowed)
    body = bytearray()
    request = client.build_request(
        "GET",
        parts.copy_with(host=address, userinfo=b""),
        # images are compressed already, and a few bytes could unpack to gigabytes
        headers={"host": parts.netloc.decode("ascii"), "accept-encoding": "identity"},
        extensions={"sni_hostname": parts.host},  # the certificate has to be the host's
    )
    answer = client.send(request, stream=True)
    try:
        for part in answer.iter_raw():
            body += part
            if len(body) > limit:
                raise HttpError("nonsense", f"it has more than {limit:,} bytes")
            if time.monotonic() > deadline:
                raise HttpError("unreachable", "it took too long")
    finally:
        answer.close()
    return Answer(answer.status_code, answer.headers, bytes(body))


def _checked_address(host, allowed):
    """Finds the IP address of a host, all of whose addresses have to be allowed."""
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise HttpError("unreachable", f"there is no host {host!r}") from None
    addresses = [entry[4][0] for entry in entries]
    for address in addresses:
        if not allowed(address):
            raise HttpError("refused", f"{host!r} is an address of this machine or its network")
    return addresses[0]
