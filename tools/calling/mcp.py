"""Tools of other programs: any MCP server, by command or by URL, from a standard mcpServers file.

    tools = ("mcp:servers.json",)       # all servers of the file; "mcp:servers.json:time": that one
    {"mcpServers": {
      "time": {"command": "uvx", "args": ["mcp-server-time"]},
      "wiki": {"url": "https://example.org/mcp", "headers": {"Authorization": "Bearer ${TOKEN}"}}
    }}

A server has `command`, `args`, `env`, `cwd`, or `url`, `headers`; `type` (also written `transport`)
is stdio, http (streamable HTTP) or sse, and can be left out but for sse; `disabled` skips it. Ours:

    "tools": ["get_time"]        only these of its tools
    "session": "trajectory"      a connection, and for a command a process, for each trajectory;
                                 "run" (the default): one for all, so its state is shared by all
    "start_timeout": 30          seconds until it has to be ready (10). A call may have to start it,
                                 so its tools have at least as long, if no `timeout` is given them

${NAME} and ${NAME:-default} are replaced by environment variables in every text. A relative cwd
starts from where the script was started; a command with a slash, and arguments, from the cwd. A
server gets no environment but HOME, LOGNAME, PATH, SHELL, TERM, USER and its `env`.

What is covered: text, images, embedded text, errors; a server that dies is an observation of kind
"server" for the calls in flight, and is started again at the next call; one that is busy or cannot
be reached is asked again (kind "network"). A server's stderr is kept for messages only.
What is not: sound and linked resources are named, not shown; servers that ask back (sampling,
elicitation, roots) are refused; OAuth; results above 1 MiB over sse, which end the connection. A
run that is killed closes its servers' stdin: one that does not end at that stays.
"""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shlex
import threading
from collections import Counter, deque
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import httpx2
from PIL import Image, UnidentifiedImageError

from run.config import UserError, near
from run.http import TEMPORARY
from tools.calling.base import NetworkError, ToolError
from tools.calling.loading import Tool

try:
    from mcp import Client, MCPError, StdioServerParameters, types
    from mcp.client.sse import sse_client
    from mcp.client.stdio import stdio_client
    from mcp.client.streamable_http import streamable_http_client
except ImportError as error:
    raise UserError(f'MCP needs a package ({error}): pip install -e ".[mcp]"') from None

log = logging.getLogger(__name__)
NO_HANDSHAKE = {types.METHOD_NOT_FOUND, types.UNSUPPORTED_PROTOCOL_VERSION}
MAYBE_LOST = {types.CONNECTION_CLOSED, types.INVALID_REQUEST, types.INTERNAL_ERROR}
KINDS = {"stdio": "stdio", "http": "http", "streamable-http": "http", "sse": "sse"}
KEYS = {  # what a server can have, and what a value has to be, in words
    "command": "a text",
    "args": "a list of texts",
    "env": "texts by name",
    "cwd": "a text",
    "url": "a text",
    "headers": "texts by name",
    "type": "a text",
    "transport": "a text",
    "disabled": "true or false",
    "tools": "a list of texts",
    "session": "a text",
    "start_timeout": "a number above 0",
}
FITS = {
    "a text": lambda value: isinstance(value, str) and value != "",
    "a list of texts": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "texts by name": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "true or false": lambda value: isinstance(value, bool),
    "a number above 0": lambda value: type(value) in (int, float) and value > 0,
}


@dataclass
class Server:
    name: str
    where: str  # for messages
    given: dict  # as in the file, for messages: with ${TOKEN}, not with what it stands for
    kind: str  # "stdio" "http" "sse"
    values: dict  # the same with the environment's values
    start_timeout: float  # seconds
    newest: bool = False  # it was found to refuse the handshake of the older protocols


def load(path: str, server: str | None, timeout: float) -> list[Tool]:
    """The tools of all servers of the file, or of the one named `server`. Every server is started
    to list them, for at most `timeout` seconds (its start_timeout; never under 10), and stopped.
    Raises UserError on a file that is wrong and on a server that does not start."""
    servers = read(path, server, timeout)
    future = asyncio.run_coroutine_threadsafe(_list(servers), _loop())
    try:
        listed = future.result()
    except BaseException:  # Ctrl-C too: the servers end
        future.cancel()
        raise
    tools = []
    for one, offered in zip(servers, listed, strict=True):
        make = partial(Connection, one)  # one object: the tools of a server share its connection
        shared = one.values.get("session", "run") == "run"
        patience = one.given.get("start_timeout", 0)
        values = json.dumps(one.values, sort_keys=True)  # with secrets: only a digest is kept
        for tool in _kept(one, offered):
            schema = {"name": _safe(tool.name), "description": tool.description or tool.title or ""}
            schema["parameters"] = parameters(tool.input_schema)
            tools.append(
                Tool(
                    name=schema["name"],
                    schema={"type": "function", "function": schema},
                    function=_function(tool.name),
                    is_async=True,
                    make=make,
                    shared=shared,
                    serial=False,  # MCP has many calls on one session
                    network=one.kind != "stdio",
                    timeout=patience if patience > timeout else None,
                    key=hashlib.blake2b(values.encode(), digest_size=12).hexdigest(),
                )
            )
    return _named_apart(tools)


def _function(name):
    async def call(connection, /, **arguments):  # `/`: an argument may be named connection
        return await connection.call(name, arguments)

    return call


def _safe(name):
    """What function calling takes as a name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def _named_apart(tools):
    """Tools of one name, of two servers: each gets its server's name in front."""
    count = Counter(tool.name for tool in tools)
    for tool in tools:
        if count[tool.name] > 1:
            tool.name = _safe(f"{tool.make.args[0].name}_{tool.name}")
            tool.schema["function"]["name"] = tool.name
    return tools


def _kept(server, offered):
    names = [tool.name for tool in offered]
    keep = server.values.get("tools", names)
    for name in keep:
        if name not in names:
            there = f" (it has: {', '.join(names)})"
            raise UserError(f"{server.where} has no tool {name!r}{near(name, names) or there}")
    return [tool for tool in offered if tool.name in keep]


async def _list(servers):
    async def one(server):
        link = _Link(server)
        try:
            if await link.ready():
                return link.tools
            raise UserError(f"{server.where} did not start: {link.why}")
        finally:
            await link.close()

    found = await asyncio.gather(*map(one, servers), return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


# -- the file


def read(path: str, server: str | None, timeout: float) -> list[Server]:
    """The servers of an mcpServers file, checked; nothing is started. Raises UserError."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read the MCP servers of {path!r}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): expected an mcpServers file") from None
    servers = found.get("mcpServers") if isinstance(found, dict) else None
    if not isinstance(servers, dict) or not servers or len(found) > 1:
        others = [key for key in found if key != "mcpServers"] if isinstance(found, dict) else []
        has = f"unknown key {others[0]!r} in {path}" if others else f"no server in {path}"
        raise UserError(f'{has}: expected {{"mcpServers": {{"a_name": {{"command": …}}}}}}')
    if server is not None and server not in servers:
        there = f" (it has: {', '.join(servers)})"
        raise UserError(f"{path} has no server {server!r}{near(server, servers) or there}")
    checked = [
        _server(name, f"MCP server {name!r} of {path}", given, timeout)
        for name, given in servers.items()
        if server in (None, name)
    ]
    if not (enabled := [one for one in checked if not one.values.get("disabled")]):
        raise UserError(f"{path}: every server that is asked for is disabled: remove `disabled`")
    return enabled


def _server(name, where, given, timeout):
    if not isinstance(given, dict):
        raise UserError(f'{where}: expected {{"command": …}} or {{"url": …}}')
    for key, value in given.items():
        if key not in KEYS:
            there = f" (keys: {', '.join(KEYS)})"
            raise UserError(f"{where}: unknown key {key!r}{near(key, KEYS) or there}")
        if not FITS[KEYS[key]](value):
            raise UserError(f"{where}: {key} = {json.dumps(value)}: expected {KEYS[key]}")
    if ("command" in given) == ("url" in given):
        raise UserError(f"{where}: expected one of command and url")
    kind = given.get("type", given.get("transport", "stdio" if "command" in given else "http"))
    if KINDS.get(kind) is None or (KINDS[kind] == "stdio") != ("command" in given):
        fits = "stdio" if "command" in given else "http or sse"
        raise UserError(f"{where}: type = {kind!r}: expected {fits}")
    if given.get("session", "run") not in ("run", "trajectory"):
        raise UserError(f"{where}: session = {given['session']!r}: expected run or trajectory")
    for key in ("url", "headers") if "command" in given else ("args", "env", "cwd"):
        if key in given:
            other = "command" if "command" in given else "url"
            raise UserError(f"{where}: {key} has no effect beside {other}: drop it")
    start = given.get("start_timeout", max(timeout, 10.0))
    if given.get("disabled"):  # its variables need not be there
        return Server(name, where, given, KINDS[kind], given, start)
    values = _expanded(given, where)
    if "headers" in values:  # a variable of a file with CRLF ends in a CR
        values["headers"] = {key: text.strip() for key, text in values["headers"].items()}
    if "cwd" in values and not Path(values["cwd"]).is_dir():
        raise UserError(f"{where}: cwd = {given['cwd']!r} is no folder: give one that exists")
    if "url" in values and not values["url"].startswith(("http://", "https://")):
        raise UserError(f"{where}: url = {given['url']!r}: expected http:// or https://")
    return Server(name, where, given, KINDS[kind], values, start)


def _is_text(value):
    return isinstance(value, str)


def _expanded(value, where):
    if isinstance(value, list):
        return [_expanded(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def variable(match):
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise UserError(f"{where}: the environment has no variable {match[1]!r}: set it")
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", variable, value)


# -- the schema of a tool, as the model and its chat template get it


def parameters(schema: dict) -> dict:
    """An inputSchema with an object's type and properties, as get_json_schema writes them: $ref is
    replaced by what it stands for, `X or null` is X with nullable, and titles and $schema, which
    say nothing to a model, are left out. Other keywords stay: the server checks them."""
    plain = _plain(schema, schema, ())
    open_ended = {"anyOf", "oneOf", "allOf", "patternProperties"} & plain.keys()
    if "properties" not in plain and open_ended:
        plain.setdefault("additionalProperties", True)
    return {**plain, "type": "object", "properties": plain.get("properties", {})}


DROPPED = {"$schema", "$id", "$comment", "$ref", "$defs", "definitions", "title"}
AS_IT_IS = {"enum", "const", "default", "examples", "required"}  # values: no schemas


def _plain(schema, root, inside):
    if isinstance(schema, list):
        return [_plain(item, root, inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    while isinstance(reference := schema.get("$ref"), str):  # which may stand for another one
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        known = reference not in inside  # a schema within itself ends in "any value"
        schema = {**(_target(root, reference) if known else {}), **rest}
        inside = (*inside, reference)
    made = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):  # its keys are names of arguments
            made[key] = {name: _plain(item, root, inside) for name, item in value.items()}
        elif key in AS_IT_IS:
            made[key] = value
        elif key not in DROPPED:
            made[key] = _plain(value, root, inside)
    return _nullable(made)


def _target(root, reference):
    """What "#/$defs/Point" stands for, {} where it is not in the schema."""
    found = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, dict) and part else found
    return found if isinstance(found, dict) and reference.startswith("#") else {}


def _nullable(schema):
    kinds, options = schema.get("type"), schema.get("anyOf")
    if isinstance(options, list) and {"type": "null"} in options:
        rest = [option for option in options if option != {"type": "null"}]
        schema = {key: value for key, value in schema.items() if key != "anyOf"}
        inner = rest[0] if len(rest) == 1 and isinstance(rest[0], dict) else {"anyOf": rest}
        return {**inner, **schema, "nullable": True}
    if isinstance(kinds, list) and "null" in kinds and len(kinds) == 2:
        return {**schema, "type": [kind for kind in kinds if kind != "null"][0], "nullable": True}
    return schema


# -- what a call returned


def content(result: types.CallToolResult) -> str | list | None:
    """Text, a list of texts and PIL images, or None for nothing. Raises ToolError for an error."""
    parts = [_part(block) for block in result.content]
    texts = [part for part in parts if isinstance(part, str)]
    if result.structured_content is not None and not parts:
        texts = parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(texts)
    if result.is_error:
        raise ToolError("exception", text or "error: the tool failed and does not say why")
    return (text or None) if len(texts) == len(parts) else parts


def _part(block):
    if block.type == "text":
        return block.text
    if block.type == "resource_link":
        return f"(a resource {block.uri}: not shown)"
    if block.type == "resource" and isinstance(block.resource, types.TextResourceContents):
        return block.resource.text
    if block.type == "resource":
        data, kind, name = block.resource.blob, block.resource.mime_type, block.resource.uri
    else:
        data, kind, name = block.data, block.mime_type, ""
    if not str(kind).startswith("image/"):
        return f"(a resource {name} of type {kind}: not shown)".replace("  ", " ")
    try:
        data = base64.b64decode(data)
        try:
            return _image(data)
        except (SyntaxError, UnidentifiedImageError):  # Pillow's words for a broken one
            return _image(_essential(data))
    except Exception as error:  # Pillow has many: what is sent is another program's
        return f"(an image that cannot be read, {type(error).__name__}: not shown)"


def _image(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _essential(png):
    """A PNG without its optional chunks: a wrong checksum in a colour profile, as the reference
    server "everything" sends it, is nothing to a browser, and Pillow would refuse the image."""
    kept, at = png[:8], 8
    while at + 8 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 5].isupper() or png[at + 4 : at + 8] == b"tRNS":
            kept += png[at:end]
        at = end
    return kept


# -- connections


@cache
def _loop():
    """All connections are on one event loop, in a thread of its own: they outlive the loops of
    their callers, and no asyncio.run that ends can cut off the end of a server."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mcp", daemon=True).start()
    return loop


async def _there(coroutine):
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _loop()))


_errors = ContextVar("errors")  # a list: HTTP status codes >= 400 of a call's own requests


class Connection:
    """A server, as a trajectory or a run has it: connected at the first call, and again at the
    first call after a loss. Calls may overlap, and come from any event loop."""

    def __init__(self, server: Server, example: dict | None = None):
        self.server = server
        self._link = None

    async def call(self, name: str, arguments: dict) -> str | list | None:
        """What the tool returns: see content(). Raises ToolError, NetworkError."""
        return await _there(self._call(name, arguments))

    async def close(self) -> None:
        """Ends the connection, and the process of a command with all its children."""
        await _there(self._close())

    async def _call(self, name, arguments):
        if self._link is None:
            self._link = _Link(self.server)
        link = self._link
        if not await link.ready():
            self._forget(link)
            error = NetworkError if self.server.kind != "stdio" else partial(ToolError, "server")
            raise error(f"error: the MCP server {self.server.name!r} does not answer: {link.short}")
        client, errors = link.client, []
        _errors.set(errors)
        asked = asyncio.ensure_future(client.call_tool(name, arguments))
        try:  # who ends a connection ends its task, and may leave those waiting who are in a call
            await asyncio.wait({asked, link.task}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return content(asked.result())
        except MCPError as error:
            if error.code == types.INTERNAL_ERROR and errors and errors[-1] in TEMPORARY:
                why = f"is busy (HTTP {errors[-1]}: {error.message})"
                raise NetworkError(f"error: the MCP server {self.server.name!r} {why}") from None
            if error.code not in MAYBE_LOST or await _answers(client):  # its own answer: it is well
                raise ToolError("exception", f"error: {error.message}") from None
        finally:
            asked.cancel()
        first = self._forget(link)
        await link.close(wait=1.0)
        if first:  # for the user; to the model its stderr says nothing
            said = link.short or link.last_words(300) or "without a word"
            log.warning("the MCP server %r ended: %s", self.server.name, said)
        text = f"error: the MCP server {self.server.name!r} ended during the call; the next call"
        raise ToolError("server", f"{text} starts it again, without its state")

    def _forget(self, link):
        """Whether it was there still: of the calls that lose a connection, one is the first, and
        another may have connected again."""
        first = self._link is link
        if first:
            self._link = None
        return first

    async def _close(self):
        link, self._link = self._link, None
        if link is not None:
            await link.close()


async def _answers(client):
    try:
        async with asyncio.timeout(5.0):
            await client.list_tools()
        return True
    except Exception:  # whatever it is, the connection is of no use
        return False


class _Link:
    """One connection to a server, entered and left by one task, as the SDK's scopes demand."""

    def __init__(self, server: Server):
        self.server = server
        self.client = None  # while it is there
        self.tools = []
        self.why = ""  # there is none, for a user: with a remedy
        self.short = ""  # the same for a model
        self.status = None  # of the last HTTP answer that was an error
        self.stderr = deque(maxlen=8)  # the last lines
        self._settled, self._stop, self._limit = asyncio.Event(), asyncio.Event(), None
        self.task = asyncio.create_task(self._live())

    async def ready(self) -> bool:
        limit = self.server.start_timeout + 1  # an unwilling server takes seconds to kill
        try:
            await asyncio.wait_for(self._settled.wait(), limit)
        except TimeoutError:
            self._explain(TimeoutError())
        return self.client is not None

    async def close(self, wait: float = 10.0) -> None:
        """Ends it; the task goes on alone where that takes more than `wait` seconds."""
        self._stop.set()
        if not self._settled.is_set() and not (self._limit and self._limit.expired()):
            self.task.cancel()  # it is starting; a cancel while it ends would leave a process
        await asyncio.wait({self.task}, timeout=wait)

    async def _live(self):
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # tracebacks of what is reported here
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self.server.start_timeout) as self._limit:
                    client = await self._connect(stack)
                    self.tools = await _all_tools(client)
                self.client = client
                self._settled.set()
                await self._stop.wait()
        except (Exception, BaseExceptionGroup) as error:
            self._explain(_leaf(error))
        finally:
            self.client = None
            self._settled.set()

    async def _connect(self, stack):
        """The handshake that all servers know comes first: some end at any other message."""
        stderr = stack.enter_context(_last_lines(self.stderr)) if self._is_stdio() else None
        if not self.server.newest:
            try:
                client = Client(self._transport(stderr), mode="legacy", cache=None)
                return await stack.enter_async_context(client)
            except (Exception, BaseExceptionGroup) as error:
                code = leaf.code if isinstance(leaf := _leaf(error), MCPError) else None
                if code not in NO_HANDSHAKE:
                    raise
        client = await stack.enter_async_context(Client(self._transport(stderr), cache=None))
        self.server.newest = True
        return client

    def _is_stdio(self):
        return self.server.kind == "stdio"

    def _transport(self, stderr):
        values = self.server.values
        if self._is_stdio():
            given = {key: values[key] for key in ("command", "args", "env", "cwd") if key in values}
            return stdio_client(StdioServerParameters(**given), stderr)
        if self.server.kind == "sse":
            return sse_client(values["url"], httpx_client_factory=self._http, timeout=30.0)
        return self._streamable(values["url"])

    @contextlib.asynccontextmanager
    async def _streamable(self, url):
        async with (
            self._http() as http,
            streamable_http_client(url, http_client=http, max_sse_event_size=None) as streams,
        ):
            yield streams

    def _http(self, headers=None, timeout=None, auth=None):
        async def saw(response):
            if response.status_code >= 400:
                self.status = response.status_code
                _errors.get([]).append(response.status_code)

        return httpx2.AsyncClient(
            headers=self.server.values.get("headers", {}),
            timeout=httpx2.Timeout(30.0, read=None),  # a call's deadline is the Toolbox's
            limits=httpx2.Limits(max_connections=None),  # so is how many there are
            event_hooks={"response": [saw]},
        )

    def _explain(self, error):
        """Sets `why` and `short`, of an error at the start or later."""
        given = self.server.given
        if isinstance(error, TimeoutError):
            self.short = f"no answer in {self.server.start_timeout:g} s"
            self.why = f'{self.short}: give it more with "start_timeout", or run it by hand'
        elif isinstance(error, OSError) and self._is_stdio():
            self.short = f"cannot run {given['command']!r}: {error.strerror}"
            self.why = f"{self.short}: install it, or correct its command"
        elif self._is_stdio():
            self.short = "it ended at once"
            by_hand = shlex.join([given["command"], *given.get("args", [])])
            said = f"saying {self.last_words(800)!r}" if self.stderr else "saying nothing"
            self.why = f"it ended at once, {said}: try `{by_hand}`"
        elif isinstance(error, httpx2.LocalProtocolError):  # its text quotes the token
            self.short = "a header has a value that cannot be sent"
            self.why = f"{self.short} to {given['url']}: correct its headers"
        elif self.status is not None:
            self.short = f"HTTP {self.status}"
            remedy = "give its token in headers" if self.status in (401, 403) else "correct its url"
            self.why = f"{self.short} from {given['url']}: {remedy}"
        else:
            self.short = f"{type(error).__name__}: {error}".removesuffix(": ")
            self.why = f"{self.short}, from {given['url']}: start it, or correct its url"

    def last_words(self, size):
        """The end of what it wrote to stderr."""
        return " | ".join(line.strip() for line in tuple(self.stderr) if line.strip())[-size:]


def _leaf(error):
    """The one error that a task group wraps."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _all_tools(client):
    page = await client.list_tools()
    tools = page.tools
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


@contextlib.contextmanager
def _last_lines(lines):
    """A file to write to, whose last lines are in `lines`. A thread reads: a full pipe would stop
    the server."""
    read_end, write_end = os.pipe()
    source = open(read_end, encoding="utf-8", errors="replace")
    threading.Thread(target=_drain, args=(source, lines), daemon=True, name="stderr").start()
    with open(write_end, "w") as file:
        yield file


def _drain(source, lines):
    with source:
        lines.extend(source)
