"""Who may ask the page (page.py) for what, and what a browser may do with the answers."""

import json
import math
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from run.config import UserError
from serve import web

MOST_BYTES = 2**20  # of a request
# No script and no style but those files; nothing is loaded from elsewhere or sent there.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Guard:
    """Lets requests through that come from our own page, or from who knows the token."""

    def __init__(self, app, token: str, host: str):
        self.app = app
        self.token = token
        self.is_local = web.is_loopback(host)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, sentence = self.refusal(Request(scope))
        if status:
            return await refusal(status, sentence)(scope, receive, send)
        await self.app(scope, receive, with_headers(send))

    def refusal(self, request: Request) -> tuple[int, str]:
        """Says (status, why) of a request that is not answered; (0, "") of one that is."""
        # 1. who says another name to this machine was sent here by a name server (DNS rebinding)
        if self.is_local and not web.names_loopback(request.scope["headers"]):
            return 403, "this page is served to 127.0.0.1 and localhost alone"

        # 2. the token, of a link, a cookie or a script
        by_header = request.headers.get("authorization", "").startswith("Bearer ")
        if by_header:
            is_known = web.has_token(request.scope["headers"], self.token)
        else:
            cookie = web.cookie_name(request.scope, "page")
            in_link = request.scope["path"] == "/"
            is_known = web.has_token_of_browser(request, cookie, self.token, in_link)
        if not is_known:
            return 401, "the token is missing or wrong: open the link that serve.page printed"

        # 3. what changes something is asked by our own page, never by another one in this browser
        if request.method not in ("GET", "HEAD"):
            return self.foreign(request, by_header)
        return 0, ""

    def foreign(self, request: Request, by_header: bool) -> tuple[int, str]:
        """Says (status, why) of another page's request to change something; (0, "") of ours."""
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site")
        host = request.headers.get("host", "")
        is_other = origin is not None and urlsplit(origin).netloc != host
        if is_other or site not in (None, "same-origin"):
            return 403, "only the page itself may ask for this"
        if origin is None and site is None and not by_header:
            return 403, "only the page itself may ask for this"
        if not request.headers.get("content-type", "").startswith("application/json"):
            return 415, "expected JSON"
        return 0, ""


def with_headers(send):
    """Adds to each answer what a browser may not do with it."""

    async def wrapped(message):
        if message["type"] == "http.response.start":
            headers = list(message["headers"])
            there = {name.lower() for name, _ in headers}
            if b"content-security-policy" not in there:
                headers.append((b"content-security-policy", POLICY.encode()))
            if b"cache-control" not in there:
                headers.append((b"cache-control", b"no-store"))
            headers += [
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
                (b"cross-origin-resource-policy", b"same-origin"),
                (b"cross-origin-opener-policy", b"same-origin"),
            ]
            message = message | {"headers": headers}
        await send(message)

    return wrapped


def reply(value, status: int = 200) -> Response:
    """Makes an answer as JSON, in ASCII: a text on the disk may hold half a character, which UTF-8
    has not."""
    text = json.dumps(finite(value), allow_nan=False)
    return Response(text, status, {"cache-control": "no-store"}, media_type="application/json")


def finite(value):
    """Makes texts of the numbers in a value that JSON has not."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def refusal(status: int, sentence: str) -> Response:
    return reply({"error": sentence}, status)


async def body_of(request: Request) -> dict:
    """Reads the JSON object of a request. UserError for anything else."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise UserError(f"a request of more than {MOST_BYTES} bytes: send less")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is no JSON") from None
    if not isinstance(asked, dict):
        raise UserError("the request is no JSON object")
    return asked
