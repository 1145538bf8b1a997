"""Our tools as an MCP server, for any MCP client, over stdio or streamable HTTP.

    python -m serve.mcp_server python sql --stdio --tool_options=sql.database=shop.sqlite
    NANOTOOL_TOKEN=secret python -m serve.mcp_server python my_tools.py:weather --http
    {"mcpServers": {"ours": {"url": "http://127.0.0.1:8765/mcp",
                             "headers": {"Authorization": "Bearer ${NANOTOOL_TOKEN}"}}}}

Tools are named as in a config. A client that opens a session (over stdio there is one) has its own
instances of stateful tools, such as python_session, until it ends the session or is silent for 30
minutes. An error of a tool is a result with isError and its text. Tools that take an image by its
number (crop, ocr, detect, …) get here the image itself, as base64 or a data URI; our own client
puts it in the place of the number. http://host:port/health says how many calls there were, how long
they took, and how much memory of a GPU is used.

What is covered: over HTTP a bearer token, without which only this machine is served; requests that
a web page sends to this machine (DNS rebinding); requests that do not come to their end, with or
without the token (web.REQUEST_SECONDS). What is not: TLS (put a proxy in front), limits on
rates, users of different rights. Who has the token runs the tools: python, code in its sandbox.
"""

import asyncio
import base64
import contextlib
import itertools
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass

from run import config
from run.config import UserError
from run.http import key_from

if __name__ == "__main__":
    config.answer_help(__file__)

from images import MAX_BYTES, Picture, check_size, open_image, to_png
from tools import Toolbox
from tools.calling.base import Tool
from tools.calling.toolbox import Session

try:
    from mcp import MCPError, types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS

    from serve import web
except ImportError as error:
    raise UserError(f'MCP needs a package ({error}): pip install -e ".[mcp]"') from None


@dataclass
class Config:
    stdio: bool = False  # for a client that starts this as a command; or
    http: bool = False  # at http://host:port/mcp
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too: needs a token
    port: int = 8765  # 0 = any free one; it is printed
    token_env: str = "NANOTOOL_TOKEN"  # the environment variable that holds the bearer token
    tool_options: tuple[str, ...] = ()  # as in train_grpo.py: search.k=5
    tool_timeout: float = 10.0  # seconds a call may take
    tool_concurrency: int = 16  # calls that run at once
    with_stdin: bool = False  # over HTTP: ends with its stdin, so with the program that started it


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if cfg.stdio == cfg.http:
        raise UserError("expected one of --stdio and --http")
    config.refuse_unused_keys(
        cfg, [(cfg.stdio, "host port token_env with_stdin", "over stdio: drop it")]
    )
    config.require_positive(cfg, "tool_timeout tool_concurrency")
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 0 to 65535")
    if cfg.http:
        web.require_token(cfg.host, cfg.token_env)


def toolbox(cfg: Config, tools: list[str]) -> Toolbox:
    """Makes the Toolbox of the tools that are served. Raises UserError."""
    if not tools:
        raise UserError("no tool is named: write python -m serve.mcp_server python --stdio")
    box = Toolbox(
        tools,
        cfg.tool_concurrency,
        cfg.tool_timeout,
        options=cfg.tool_options,
    )
    for environment in box.environments:
        if environment.hooks:
            raise UserError(
                f"{environment.name} has {', '.join(environment.hooks)}, for which no MCP client "
                "asks: serve a class that has tools alone"
            )
    return box


def stateful(box: Toolbox) -> list[str]:
    """Lists the tools that keep a state between the calls of a session."""
    names = []
    for tool in box.tools.values():
        if tool.make and not tool.shared and not tool.pure and not tool.sees:
            names.append(tool.name)
    return names


@dataclass
class Health:
    """What a server did so far."""

    running: int = 0  # calls, at this moment
    calls: int = 0  # that have ended
    errors: int = 0  # of them
    seconds: float = 0.0  # that they took, together


def server(box: Toolbox, session: Session | None = None, health: Health | None = None) -> Server:
    """Makes the MCP server of a Toolbox. session: the one of all calls; None: each MCP session's
    own. health: where calls are counted."""
    needs_session = bool(stateful(box)) and session is None
    health = health or Health()

    async def list_tools(ctx, params):
        return types.ListToolsResult(tools=[_described(tool) for tool in box.tools.values()])

    async def call_tool(ctx, params):
        if needs_session and ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
            text = f"{stateful(box)[0]} keeps a state: initialize a session first"
            raise MCPError(types.INVALID_REQUEST, text)
        tool = box.tools.get(params.name)
        arguments = params.arguments or {}
        start = time.perf_counter()
        health.running += 1
        error = "exception"
        try:
            if tool is not None and tool.sees:
                content, error = await _call_with_image(box, tool, arguments)
            else:
                tools = session or _session_of(ctx, box)
                content, error, _ = await tools.call(params.name, arguments)
        except UserError as wrong:  # a database that has gone, say: the server goes on
            content = f"error: {wrong}"
        finally:
            health.running -= 1
            health.calls += 1
            health.errors += error is not None
            health.seconds += time.perf_counter() - start
        return types.CallToolResult(content=_blocks(content), is_error=error is not None)

    async def discover(ctx, params):
        # the newest protocol has no sessions over HTTP: clients take the one before it instead
        return types.DiscoverResult(
            supported_versions=list(HANDSHAKE_PROTOCOL_VERSIONS),
            capabilities=mcp_server.get_capabilities(),
        )

    mcp_server = Server("nanotool", on_list_tools=list_tools, on_call_tool=call_tool)
    if needs_session:
        mcp_server.add_request_handler("server/discover", types.RequestParams, discover)
    return mcp_server


def _described(tool: Tool):
    function = tool.schema["function"]
    parameters = function["parameters"]
    if tool.sees:
        properties = {**parameters["properties"], "image": IMAGE}
        parameters = {**parameters, "properties": properties}
    return types.Tool(
        name=function["name"],
        description=function["description"],
        input_schema=parameters,
    )


# In the words of JSON Schema, as any server may say that it wants an image.
IMAGE = {
    "type": "string",
    "contentEncoding": "base64",
    "contentMediaType": "image/png",
    "description": "The image, as base64 or as a data URI.",
}
SIZE = re.compile(r"data:[^,]*;shown=(\d{1,5})x(\d{1,5})[;,]", re.ASCII)


async def _call_with_image(box, tool, arguments):
    """Calls a tool that sees -> content, error kind or None. The image that came with it is
    the only one there is, and gone after it."""
    pictures = []
    if "image" in arguments:
        try:
            pictures.append(await asyncio.to_thread(_picture, arguments["image"]))
        except UserError as wrong:
            return f"error: {wrong}", "bad_image"
        arguments = {**arguments, "image": 1}
    tools = box.open({}, pictures)
    try:
        content, error, _ = await tools.call(tool.name, arguments)
        return content, error
    finally:
        await tools.close()


def _picture(text):
    """Reads a picture of base64 or a data URI; `;shown=640x480` in it is the size at which a model
    sees it."""
    if not isinstance(text, str):
        raise UserError("image must be base64 or a data URI")
    is_uri = text[:5].lower() == "data:"
    picture = Picture(open_image(text if is_uri else f"data:;base64,{text}"))
    size = SIZE.match(text[:200])
    if size:
        width, height = int(size[1]), int(size[2])
        check_size(width, height, "the image as shown")
        picture.shown = picture.original.resize((width, height))
    return picture


def _session_of(ctx, box):
    """Gives the Toolbox session of this MCP session, closed with it."""
    connection = ctx.session._connection  # the SDK has no other way to what ends with a session
    if "session" not in connection.state:
        session = box.open({})
        connection.state["session"] = session
        connection.exit_stack.push_async_callback(session.close)
    return connection.state["session"]


def _blocks(content):
    """Writes what a tool returned as MCP sends it."""
    parts = content if isinstance(content, list) else [content]
    blocks = []
    for part in parts:
        if isinstance(part, str):
            blocks.append(types.TextContent(type="text", text=part))
        else:
            data = base64.b64encode(to_png(part)).decode()
            blocks.append(types.ImageContent(type="image", data=data, mime_type="image/png"))
    return blocks


async def try_out(box: Toolbox) -> None:
    """Makes what a session would have, and closes it: a wrong option is a UserError at the start,
    not an error of every call."""
    for tool in box.tools.values():
        if not tool.make or tool.shared:
            continue
        session = box.open({})
        try:
            await session.make(tool)
        except UserError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise UserError(f"tool {tool.name!r} cannot be made: {why}") from error
        finally:
            await session.close()


# -- stdio


async def over_stdio(box: Toolbox) -> None:
    """Serves one client until it closes our stdin."""
    session = box.open({})
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the protocol's
            await try_out(box)
        mcp_server = server(box, session)
        async with stdio_server() as (read, write):
            await mcp_server.run(read, write, mcp_server.create_initialization_options())
    finally:
        await session.close()
        await box.close()


# -- HTTP


MOST = 4 * 2**20  # bytes of a request
MOST_WITH_IMAGE = MOST + MAX_BYTES * 4 // 3  # which travels as base64


def at_mcp(box: Toolbox, host: str, health: Health):
    """Makes the ASGI application of MCP at /mcp, for whoever asks; it has a lifespan."""
    sees = any(tool.sees for tool in box.tools.values())
    return server(box, health=health).streamable_http_app(
        host=host,
        stateless_http=not stateful(box),
        max_request_body_size=MOST_WITH_IMAGE if sees else MOST,
    )


def application(cfg: Config, box: Toolbox):
    """Makes the ASGI application: MCP, for who has the token."""
    health = Health()
    inner = at_mcp(box, cfg.host, health)
    token = key_from(cfg.token_env)

    async def app(scope, receive, send):
        if scope["type"] == "http" and not web.has_token(scope["headers"], token):
            return await web.refuse_token(send)
        if scope["type"] == "http" and scope["path"] == "/health":
            return await web.answer(send, 200, {**asdict(health), **gpu_memory()})
        try:
            await inner(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                await box.close()

    return app


def gpu_memory() -> dict:
    """Counts the bytes that torch holds on the GPU, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    return {"gpu_bytes": torch.cuda.memory_reserved()}


def over_http(cfg: Config, tools: list[str]) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    box = toolbox(cfg, tools)
    asyncio.run(try_out(box))
    listening = web.listen(cfg.host, cfg.port)
    if cfg.with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    print(f"serving {', '.join(box.tools)} at {web.address(listening)}/mcp", flush=True)
    web.serve(application(cfg, box), listening)


def _end_with_stdin():
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> None:
    """Serves, as the command line says: the names of tools, then the options."""
    tools = list(itertools.takewhile(lambda item: not item.startswith("-"), argv))
    options = []
    for item in argv[len(tools) :]:
        options.append(f"{item}=true" if item in ("--stdio", "--http") else item)
    cfg = config.parse(Config, options, check)
    if cfg.http:
        over_http(cfg, tools)
        return
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the protocol's
        box = toolbox(cfg, tools)
    asyncio.run(over_stdio(box))


if __name__ == "__main__":
    config.main(main)
