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

An argument that the server declares as an image ("contentMediaType": "image/…" in its schema) is
the number of one of the trajectory's images to the model; the image itself is sent.

What is covered: text, images, embedded text, errors; a server that dies is an observation of kind
"server" for the calls in flight, and is started again at the next call; one that is busy or cannot
be reached is asked again (kind "network"). A server's stderr is kept for messages only.
What is not: sound and linked resources are named, not shown; servers that ask back (sampling,
elicitation, roots) are refused; OAuth; results above 1 MiB over sse, which end the connection. A
run that is killed closes its servers' stdin: one that does not end at that stays.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import threading
from collections import Counter, deque
from contextvars import ContextVar
from functools import cache, partial

import httpx2
from pydantic import ValidationError

from run.config import UserError, near
from run.http import TEMPORARY
from tools.calling.base import NetworkError, Tool, ToolError, numbered
from tools.calling.mcp_file import Server, read

try:
    from mcp import Client, MCPError, StdioServerParameters, types
    from mcp.client.sse import sse_client
    from mcp.client.stdio import stdio_client
    from mcp.client.streamable_http import streamable_http_client
except ImportError as error:
    raise UserError(f'MCP needs a package ({error}): pip install -e ".[mcp]"') from None

from tools.calling.mcp_forms import (
    clean_result,
    clean_tools,
    content,
    data_uri,
    image_numbers,
    parameters,
)

log = logging.getLogger(__name__)
NO_HANDSHAKE = {types.METHOD_NOT_FOUND, types.UNSUPPORTED_PROTOCOL_VERSION}
MAYBE_LOST = {types.CONNECTION_CLOSED, types.INVALID_REQUEST, types.INTERNAL_ERROR}
NAME_LENGTH = 64  # characters
SESSION_CODES = {types.CONNECTION_CLOSED, types.INVALID_REQUEST, -32001}  # -32001: "not found"
LOST_SESSION = re.compile(
    r"session.*(not found|not exist|expired|terminated|invalid|unknown|no longer|closed)"
    r"|(no|not|invalid|unknown|missing|expired)\b.*session",
    re.I | re.S,
)
TO_ANSWER = 5.0  # seconds, for a server that may be lost
RETRIES_WITH_IMAGES = 11  # with the pauses between them a minute
TO_END = 10.0  # seconds that the end of a connection is waited for; it may go on alone


def load(path: str, server: str | None, timeout: float) -> list[Tool]:
    """Lists the tools of all servers of the file, or of the one named `server`. Every server is
    started to list them, for at most `timeout` seconds (its start_timeout; never under 10), and
    stopped. Raises UserError on a file that is wrong and on a server that does not start."""
    servers = read(path, server, timeout)
    future = asyncio.run_coroutine_threadsafe(_list_all(servers), _loop())
    try:
        offers = future.result()
    except BaseException:  # Ctrl-C too: the servers end
        future.cancel()
        raise
    tools = []
    for each, offered in zip(servers, offers, strict=True):
        make = partial(Connection, each)  # one object: the tools of a server share its connection
        for tool in _wanted(each, offered):
            tools.append(_tool(each, tool, make, timeout))
    return _named_apart(tools)


def _tool(server, offered, make, timeout):
    """Makes a Tool of one that a server offers."""
    name = _safe(offered.name)
    wanted, images = image_numbers(parameters(offered.input_schema))
    function = {
        "name": name,
        "description": offered.description or offered.title or "",
        "parameters": wanted,
    }
    start_timeout = server.given.get("start_timeout", 0)
    is_remote = server.kind != "stdio"
    return Tool(
        name=name,
        schema={"type": "function", "function": function},
        function=_function_with_images(offered.name, images) if images else _function(offered.name),
        is_async=True,
        make=make,
        shared=server.values.get("session", "run") == "run",
        serial=False,  # MCP has many calls on one session
        network=is_remote,
        takes_images=bool(images),
        timeout=start_timeout if start_timeout > timeout else None,
        # a server with a model in it takes long to start again: half a minute and more
        retries=RETRIES_WITH_IMAGES if images and is_remote else None,
    )


def _function(name):
    async def call(connection, /, **arguments):  # `/`: an argument may be named connection
        return await connection.call(name, arguments)

    return call


def _function_with_images(name, places):
    """Makes the function of a tool that is sent images: `places` are the arguments in which the
    model gives an image's number."""

    async def call(connection, images, /, **arguments):
        sent = dict(arguments)
        for place in places:
            if place in sent:
                picture = numbered(images, sent[place])
                sent[place] = await asyncio.to_thread(data_uri, picture)
        return await connection.call(name, sent, asks_again=True)

    return call


def _safe(name):
    """Makes a name that function calling takes."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:NAME_LENGTH]


def _named_apart(tools):
    """Renames tools of one name, of two servers: each gets its server's name in front. Names that
    _safe() has made equal get a number."""
    count = Counter(tool.name for tool in tools)
    servers = {}  # name -> those that have it
    for tool in tools:
        servers.setdefault(tool.name, set()).add(tool.make.args[0].name)
    for tool in tools:
        if count[tool.name] > 1 and len(servers[tool.name]) > 1:
            _rename(tool, _safe(f"{tool.make.args[0].name}_{tool.name}"))
    taken = set()
    for tool in tools:
        name = tool.name
        number = 2
        while tool.name in taken:
            end = f"_{number}"
            _rename(tool, name[: NAME_LENGTH - len(end)] + end)
            number += 1
        taken.add(tool.name)
    return tools


def _rename(tool, name):
    tool.name = name
    tool.schema["function"]["name"] = name


def _wanted(server, offered):
    """Picks those of a server's tools that the file asks for."""
    names = [tool.name for tool in offered]
    wanted = server.values.get("tools", names)
    for name in wanted:
        if name not in names:
            hint = near(name, names) or f" (it has: {', '.join(names)})"
            raise UserError(f"{server.where} has no tool {name!r}{hint}")
    return [tool for tool in offered if tool.name in wanted]


async def _list_all(servers):
    """Lists what each server offers. All are started at the same time, and have ended after it."""
    results = await asyncio.gather(*map(_list, servers), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def _list(server):
    link = _Link(server)
    try:
        if await link.ready():
            return link.tools
        raise UserError(f"{server.where} did not start: {link.why}")
    finally:
        await link.close()


# -- connections


@cache
def _loop():
    """Starts the one event loop of all connections, in a thread of its own: they outlive the loops
    of their callers, and no asyncio.run that ends can cut off the end of a server. It is not the
    loop of run/loop.py: load() waits for it, also when what runs on that one makes a Toolbox."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mcp", daemon=True).start()
    return loop


async def _on_its_loop(coroutine):
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _loop()))


_http_errors = ContextVar("http_errors")  # a list: status codes >= 400 of a call's own requests


class Connection:
    """A server, as a trajectory or a run has it: connected at the first call, and again at the
    first call after a loss. Calls may overlap, and come from any event loop."""

    def __init__(self, server: Server, example: dict | None = None):
        self.server = server
        self._link = None

    async def call(self, name: str, arguments: dict, asks_again: bool = False) -> str | list | None:
        """Calls a tool; returns what it gives: see content(). Raises ToolError, NetworkError.
        asks_again: a server that is lost during the call has kept nothing of it, so it can be asked
        again."""
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # sent, it would end the connection of all
            text = "error: the arguments have half a character (a lone surrogate): write text"
            raise ToolError("bad_arguments", text) from None
        try:
            return await _on_its_loop(self._call(name, arguments))
        except ToolError as error:
            if error.kind == "server" and asks_again and self.server.kind != "stdio":
                raise NetworkError(error.text) from None
            raise

    async def close(self) -> None:
        """Ends the connection, and the process of a command with all its children."""
        await _on_its_loop(self._close())

    async def _call(self, name, arguments):
        link = await self._connected()
        http_errors = []
        _http_errors.set(http_errors)
        request = asyncio.ensure_future(link.client.call_tool(name, arguments))
        try:  # who ends a connection ends its task, and may leave those waiting who are in a call
            await asyncio.wait({request, link.task}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                return content(request.result())
        except MCPError as error:
            is_busy = http_errors and http_errors[-1] in TEMPORARY
            if error.code == types.INTERNAL_ERROR and is_busy:
                why = f"is busy (HTTP {http_errors[-1]}: {error.message})"
                raise NetworkError(f"error: the MCP server {self.server.name!r} {why}") from None
            # not repeated on a new session, though nothing was done: the model has to know that
            # what it did before is lost
            if not self._is_session_lost(error, http_errors):
                if error.code not in MAYBE_LOST or await _answers(link.client):
                    # its own answer: it is well
                    raise ToolError("exception", f"error: {error.message}") from None
        except ValidationError as error:
            raise ToolError("exception", f"error: {_invalid(error)}") from None
        finally:
            request.cancel()
        await self._lose(link)
        text = f"error: the MCP server {self.server.name!r} ended during the call; the next call"
        raise ToolError("server", f"{text} starts it again, without its state")

    def _is_session_lost(self, error, http_errors):
        """Says whether the server does not know our session any more: it was started anew, say."""
        if self.server.kind == "stdio":
            return False
        if http_errors and http_errors[-1] == 404 and error.code == types.INVALID_REQUEST:
            return True  # what the SDK makes of a 404 that says nothing
        return error.code in SESSION_CODES and LOST_SESSION.search(error.message) is not None

    async def _connected(self):
        """Gives the link, which is there. Raises ToolError, NetworkError if it cannot be."""
        if self._link is None:
            self._link = _Link(self.server)
        link = self._link
        if await link.ready():
            return link
        self._forget(link)
        text = f"error: the MCP server {self.server.name!r} does not answer: {link.short}"
        if self.server.kind == "stdio":
            raise ToolError("server", text)
        raise NetworkError(text)

    async def _lose(self, link):
        is_first = self._forget(link)
        await link.close(wait=1.0)
        if is_first:  # for the user; to the model its stderr says nothing
            words = link.short or link.last_words(300) or "without a word"
            log.warning("the MCP server %r ended: %s", self.server.name, words)

    def _forget(self, link):
        """Drops a link; says whether it was there still: of the calls that lose a connection, one
        is the first, and another may have connected again."""
        is_first = self._link is link
        if is_first:
            self._link = None
        return is_first

    async def _close(self):
        link = self._link
        self._link = None
        if link is not None:
            await link.close()


async def _answers(client):
    try:
        async with asyncio.timeout(TO_ANSWER):
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
        self._is_settled = asyncio.Event()  # it is there, or cannot be
        self._has_to_stop = asyncio.Event()
        self._start_limit = None
        self.task = asyncio.create_task(self._live())

    async def ready(self) -> bool:
        """Waits while the connection starts; says whether it is there."""
        limit = self.server.start_timeout + 1  # an unwilling server takes seconds to kill
        try:
            await asyncio.wait_for(self._is_settled.wait(), limit)
        except TimeoutError:
            self._explain(TimeoutError())
        return self.client is not None

    async def close(self, wait: float = TO_END) -> None:
        """Ends it; the task goes on alone where that takes more than `wait` seconds."""
        self._has_to_stop.set()
        is_ending = self._start_limit and self._start_limit.expired()
        if not self._is_settled.is_set() and not is_ending:
            self.task.cancel()  # it is starting; a cancel while it ends would leave a process
        await asyncio.wait({self.task}, timeout=wait)

    async def _live(self):
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # tracebacks of what is reported here
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self.server.start_timeout) as self._start_limit:
                    client = await self._connect(stack)
                    left_out = _read_leniently(client)
                    self.tools = await _all_tools(client)
                if left_out and not self.server.has_warned:
                    self.server.has_warned = True
                    log.warning("%s: left out: %s", self.server.where, "; ".join(left_out))
                self.client = client
                self._is_settled.set()
                await self._has_to_stop.wait()
        except (Exception, BaseExceptionGroup) as error:
            self._explain(_leaf(error))
        finally:
            self.client = None
            self._is_settled.set()

    async def _connect(self, stack):
        """Connects, by the handshake that all servers know first: some end at any other message."""
        stderr = None
        if self._is_stdio():
            stderr = stack.enter_context(_last_lines(self.stderr))
        if not self.server.newest:
            try:
                client = Client(self._transport(stderr), mode="legacy", cache=None)
                return await stack.enter_async_context(client)
            except (Exception, BaseExceptionGroup) as error:
                cause = _leaf(error)
                if not isinstance(cause, MCPError) or cause.code not in NO_HANDSHAKE:
                    raise
        client = await stack.enter_async_context(Client(self._transport(stderr), cache=None))
        self.server.newest = True
        return client

    def _is_stdio(self):
        return self.server.kind == "stdio"

    def _transport(self, stderr):
        values = self.server.values
        if self._is_stdio():
            keys = ("command", "args", "env", "cwd")
            parameters = {key: values[key] for key in keys if key in values}
            return stdio_client(StdioServerParameters(**parameters), stderr)
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
        async def note_errors(response):
            if response.status_code >= 400:
                self.status = response.status_code
                _http_errors.get([]).append(response.status_code)

        return httpx2.AsyncClient(
            headers=self.server.values.get("headers", {}),
            timeout=httpx2.Timeout(30.0, read=None),  # a call's deadline is the Toolbox's
            limits=httpx2.Limits(max_connections=None),  # so is how many there are
            event_hooks={"response": [note_errors]},
        )

    def _explain(self, error):
        """Sets `why` and `short`, of an error at the start or later."""
        if isinstance(error, TimeoutError):
            self.short = f"no answer in {self.server.start_timeout:g} s"
            self.why = f'{self.short}: give it more with "start_timeout", or run it by hand'
        elif self._is_stdio():
            self._explain_command(error)
        else:
            self._explain_url(error)

    def _explain_command(self, error):
        given = self.server.given
        if self._explain_answer(error):
            return
        if isinstance(error, OSError):
            self.short = f"cannot run {given['command']!r}: {error.strerror}"
            self.why = f"{self.short}: install it, or correct its command"
            return
        self.short = "it ended at once"
        by_hand = shlex.join([given["command"], *given.get("args", [])])
        words = f"saying {self.last_words(800)!r}" if self.stderr else "saying nothing"
        self.why = f"it ended at once, {words}: try `{by_hand}`"

    def _explain_url(self, error):
        url = self.server.given["url"]
        if self._explain_answer(error):
            return
        if isinstance(error, httpx2.LocalProtocolError):  # its text quotes the token
            self.short = "a header has a value that cannot be sent"
            self.why = f"{self.short} to {url}: correct its headers"
        elif self.status in (401, 403):
            self.short = f"HTTP {self.status}"
            self.why = f"{self.short} from {url}: give its token in headers"
        elif self.status is not None:
            self.short = f"HTTP {self.status}"
            self.why = f"{self.short} from {url}: correct its url"
        else:
            self.short = f"{type(error).__name__}: {error}".removesuffix(": ")
            self.why = f"{self.short}, from {url}: start it, or correct its url"

    def _explain_answer(self, error):
        """Explains an error, or nonsense, that a live server answered; False if it is neither."""
        if isinstance(error, ValidationError):
            self.short = _invalid(error)
        elif isinstance(error, MCPError) and error.code != types.CONNECTION_CLOSED:
            if self.status is not None:  # the words are the SDK's
                return False
            words = error.message.partition("\n")[0][:200]
            self.short = f"it answered with the error {words!r} ({error.code})"
        else:
            return False
        self.why = f"{self.short}: ask who makes it, or leave it out"
        return True

    def last_words(self, size):
        """Gives the end of what it wrote to stderr."""
        lines = [line.strip() for line in tuple(self.stderr)]
        return " | ".join(line for line in lines if line)[-size:]


def _leaf(error):
    """Finds the one error that a task group wraps."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _invalid(error):
    """Writes a ValidationError in one line."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    value = repr(first["input"])[:200]
    return f"its answer is not what MCP expects, at {place}: {first['msg']}, not {value}"


def _read_leniently(client):
    """Lets what servers say in a form that MCP does not know pass, where its meaning is clear. The
    SDK checks an answer as a whole, and has no other way to what came. -> the list to which goes
    what was left out"""
    left_out = []
    dispatcher = client.session._dispatcher
    send = dispatcher.send_raw_request

    async def send_raw_request(method, *arguments, **options):
        answer = await send(method, *arguments, **options)
        if method == "tools/list":
            return clean_tools(answer, left_out)
        if method == "tools/call":
            return clean_result(answer)
        return answer

    dispatcher.send_raw_request = send_raw_request
    return left_out


async def _all_tools(client):
    page = await client.list_tools()
    tools = page.tools
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


@contextlib.contextmanager
def _last_lines(lines):
    """Opens a file to write to, whose last lines are in `lines`. A thread reads: a full pipe would
    stop the server."""
    read_end, write_end = os.pipe()
    source = open(read_end, encoding="utf-8", errors="replace")
    threading.Thread(target=_drain, args=(source, lines), daemon=True, name="stderr").start()
    with open(write_end, "w") as file:
        yield file


def _drain(source, lines):
    with source:
        lines.extend(source)
