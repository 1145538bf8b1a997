"""One request to a server, for tools: what goes wrong becomes an error that the model can read."""

import ipaddress
import os
import ssl
from urllib.parse import urlsplit

import httpx2 as httpx

from run.config import UserError
from tools.calling.base import NetworkError, ToolError

AGAIN = 408, 425, 429, 500, 502, 503, 504, 529  # worth asking again: busy, or for a moment away
PATIENCE = httpx.Timeout(600.0, connect=10.0)  # the deadline of the call is usually shorter


def secure(url: str) -> ssl.SSLContext:
    """Checks the address; what fetch() wants as `tls`, made once: it takes longer than a call.
    UserError if that is no address."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is no address: expected http(s)://host/path")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url!r} is no address: {error}") from None
    return httpx.create_ssl_context()


def key_for(url: str, name: str, who: str) -> str:
    """The key in the environment variable `name`; "" if there is none, which only a server on this
    machine may do without, or one for which the name is "". who: "ask" or such: what has the
    options url and key_env. UserError if it is missing."""
    key = os.environ.get(name, "").strip() if name else ""  # of a file with CRLF, a CR stays
    host = urlsplit(url).hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if name and not key and not here:
        way_out = f"export {name}=..., or give {who}.key_env= if it wants none"
        raise UserError(f"{who}.url = {url!r} needs a key, and {name} is not set: {way_out}")
    return key


async def fetch(
    who: str, method: str, url: str, request: dict, tls: ssl.SSLContext
) -> dict | list | str | int | float | bool | None:
    """The server's answer, from JSON. request: headers, params and json of the request. who: the
    server, for messages. NetworkError if trying again may help, else ToolError."""
    try:  # a client for the call: several event loops may use a tool, one after the other
        async with httpx.AsyncClient(timeout=PATIENCE, verify=tls) as client:
            answer = await client.request(method, url, **request)
    except httpx.LocalProtocolError:  # its text quotes the key
        raise ToolError("network", f"error: {who} cannot be asked with the key as it is") from None
    except httpx.RequestError as error:
        why = f"{type(error).__name__} {error}".strip()
        raise NetworkError(f"error: {who} does not answer ({why})") from None
    why = f"HTTP {answer.status_code}: {' '.join(answer.text.split())[:200]}"
    if answer.status_code in AGAIN:
        raise NetworkError(f"error: {who} is busy ({why})")
    if answer.status_code in (401, 403):
        raise ToolError("network", f"error: {who} refuses the key ({why})")
    if answer.status_code != 200:
        raise ToolError("network", f"error: {who} refuses the request ({why})")
    try:
        return answer.json()
    except ValueError:
        raise not_understood(who, answer.text) from None


def not_understood(who: str, text: str) -> ToolError:
    return ToolError("network", f"error: the answer of {who} makes no sense: {text[:200]}")


def plain(text: str) -> str:
    """Text that can be sent: a lone surrogate, which JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()
