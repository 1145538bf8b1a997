"""Our tools as an MCP server, for any MCP client, over stdio or streamable HTTP.

    python -m serve.mcp_server python sql --stdio --tool_options=sql.database=shop.sqlite
    NANOTOOL_TOKEN=secret python -m serve.mcp_server python my_tools.py:weather --http --workers=4
    {"mcpServers": {"ours": {"url": "http://127.0.0.1:8765/mcp",
                             "headers": {"Authorization": "Bearer ${NANOTOOL_TOKEN}"}}}}

Tools are named as in a config. A client that opens a session (over stdio there is one) has its own
instances of stateful tools, such as python_session, until it ends the session or is silent for 30
minutes. With workers each request may go to another process: tools that keep a state between the
calls of a session are refused then. An error of a tool is a result with isError and its text.

What is covered: over HTTP a bearer token, without which only this machine is served; requests that
a web page sends to this machine (DNS rebinding). What is not: TLS (put a proxy in front), limits on
rates, users of different rights. Who has the token runs the tools: python, code in its sandbox.
"""

import asyncio
import base64
import contextlib
import hmac
import io
import json
import multiprocessing
import os
import socket
import sys
import threading
from dataclasses import dataclass
from functools import partial

from run import config
from run.config import UserError

if __name__ == "__main__":
    config.answer_help(__file__)

from tools import Toolbox
from tools.calling.toolbox import Session

try:
    import uvicorn
    from mcp import MCPError, types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS
    from uvicorn.supervisors import Multiprocess
except ImportError as error:
    raise UserError(f'MCP needs a package ({error}): pip install -e ".[mcp]"') from None


@dataclass
class Config:
    stdio: bool = False  # for a client that starts this as a command; or
    http: bool = False  # at http://host:port/mcp
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too: needs a token
    port: int = 8765  # 0 = any free one; it is printed
    workers: int = 1  # processes
    token_env: str = "NANOTOOL_TOKEN"  # the environment variable that holds the bearer token
    tool_options: tuple[str, ...] = ()  # as in train_grpo.py: search.k=5
    tool_timeout: float = 10.0  # seconds a call may take
    tool_concurrency: int = 16  # calls that run at once, in each worker
    tool_cache: str = "memory"  # memory or none: whether results of pure tools are kept


def check(cfg: Config) -> None:
    """Rules across keys."""
    if cfg.stdio == cfg.http:
        raise UserError("expected one of --stdio and --http")
    config.refuse_unused_keys(
        cfg, [(cfg.stdio, "host port workers token_env", "over stdio: drop it")]
    )
    config.require_positive(cfg, "workers tool_timeout tool_concurrency")
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 0 to 65535")
    if cfg.http and not _token(cfg) and not _is_loopback(cfg.host):
        raise UserError(
            f"host = {cfg.host!r} lets other machines in: set the environment variable "
            f"{cfg.token_env} to a token, or serve 127.0.0.1"
        )


def _token(cfg):
    return os.environ.get(cfg.token_env, "").strip()  # of a file with CRLF, a CR stays


def _is_loopback(host):
    """Only those for which the SDK also looks at a request's Host: no web page gets in."""
    return host in ("127.0.0.1", "localhost", "::1")


def toolbox(cfg: Config, tools: list[str]) -> Toolbox:
    """The tools that are served. Raises UserError."""
    if not tools:
        raise UserError("no tool is named: write python -m serve.mcp_server python --stdio")
    return Toolbox(
        tools,
        cfg.tool_concurrency,
        cfg.tool_timeout,
        options=cfg.tool_options,
        cache=cfg.tool_cache,
    )


def stateful(box: Toolbox) -> list[str]:
    """The names of the tools that keep a state between the calls of a session."""
    kept = [tool for tool in box.tools.values() if tool.make and not (tool.shared or tool.pure)]
    return [tool.name for tool in kept]


def server(box: Toolbox, session: Session | None = None) -> Server:
    """The MCP server of a Toolbox. session: the one of all calls; None: each MCP session's own."""
    stays = bool(stateful(box)) and session is None

    async def list_tools(ctx, params):
        described = [schema["function"] for schema in box.schemas]
        listed = [
            types.Tool(
                name=tool["name"], description=tool["description"], input_schema=tool["parameters"]
            )
            for tool in described
        ]
        return types.ListToolsResult(tools=listed)

    async def call_tool(ctx, params):
        if stays and ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
            text = f"{stateful(box)[0]} keeps a state: initialize a session first"
            raise MCPError(types.INVALID_REQUEST, text)
        mine = session or _session_of(ctx, box)
        try:
            content, error, _ = await mine.call(params.name, params.arguments or {})
        except UserError as wrong:  # a database that has gone, say: the server goes on
            content, error = f"error: {wrong}", "exception"
        return types.CallToolResult(content=_blocks(content), is_error=error is not None)

    async def discover(ctx, params):
        # the newest protocol has no sessions over HTTP: clients take the one before it instead
        return types.DiscoverResult(
            supported_versions=list(HANDSHAKE_PROTOCOL_VERSIONS),
            capabilities=made.get_capabilities(),
        )

    made = Server("nanotool", on_list_tools=list_tools, on_call_tool=call_tool)
    if stays:
        made.add_request_handler("server/discover", types.RequestParams, discover)
    return made


def _session_of(ctx, box):
    """The Toolbox session of this MCP session, closed with it."""
    connection = ctx.session._connection  # the SDK has no other way to what ends with a session
    if "session" not in connection.state:
        connection.state["session"] = session = box.open({})
        connection.exit_stack.push_async_callback(session.close)
    return connection.state["session"]


def _blocks(content):
    parts = content if isinstance(content, list) else [content]
    return [
        types.TextContent(type="text", text=part)
        if isinstance(part, str)
        else types.ImageContent(type="image", data=_png(part), mime_type="image/png")
        for part in parts
    ]


def _png(image):
    file = io.BytesIO()
    try:
        image.save(file, "PNG")
    except OSError:  # a mode that PNG has not, such as CMYK
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def try_out(box: Toolbox) -> None:
    """Makes what a session would have, and closes it: a wrong option is a UserError at the start,
    not an error of every call."""
    for tool in box.tools.values():
        if tool.make and not tool.shared:
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
        made = server(box, session)
        async with stdio_server() as (read, write):
            await made.run(read, write, made.create_initialization_options())
    finally:
        await session.close()
        await box.close()


# -- HTTP


def application(cfg: Config, box: Toolbox):
    """The ASGI application of one process."""
    made = server(box)
    inner = made.streamable_http_app(host=cfg.host, stateless_http=not stateful(box))
    token = _token(cfg)

    async def app(scope, receive, send):
        if scope["type"] == "http" and token and not _has_token(scope["headers"], token):
            return await _refuse(send)
        try:
            await inner(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                await box.close()

    return app


def worker(cfg: Config, tools: list[str]):
    """The ASGI application of one of several processes, made in it."""
    # a worker that outlived a killed parent would hold the port
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return application(cfg, toolbox(cfg, tools))


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _has_token(headers, token):
    given = dict(headers).get(b"authorization", b"")
    scheme, _, value = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(value.strip(), token.encode())


async def _refuse(send):
    body = json.dumps({"error": "a bearer token is missing or wrong"}).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def over_http(cfg: Config, tools: list[str]) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    box = toolbox(cfg, tools)  # what is wrong with a tool is said here, once
    if cfg.workers > 1 and (names := stateful(box)):
        raise UserError(
            f"workers = {cfg.workers}: {names[0]} keeps a state between the calls of a session, "
            "and each worker would have its own: use --workers=1"
        )
    asyncio.run(try_out(box))
    listening = _listen(cfg)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/mcp"
    print(f"serving {', '.join(box.tools)} at {url}", flush=True)
    settings = uvicorn.Config(
        partial(worker, cfg, tools) if cfg.workers > 1 else partial(application, cfg, box),
        factory=True,
        workers=cfg.workers,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,  # clients keep a stream open for ever
        timeout_worker_healthcheck=60,  # a worker that still imports is not hung
    )
    if cfg.workers > 1:
        asyncio.run(box.close())
        Multiprocess(settings, sockets=[listening]).run()
    else:
        uvicorn.Server(settings).run(sockets=[listening])


def _listen(cfg):
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((cfg.host, cfg.port))
        listening.listen(2048)  # who comes before the workers are ready waits
    except OSError as error:
        where = f"{cfg.host}:{cfg.port}"
        raise UserError(
            f"cannot listen at {where} ({error.strerror}): give another --port"
        ) from None
    return listening


def main(argv: list[str]) -> None:
    start = next((i for i, item in enumerate(argv) if item.startswith("-")), len(argv))
    flags = {"--stdio": "--stdio=true", "--http": "--http=true"}
    cfg = config.parse(Config, [flags.get(item, item) for item in argv[start:]], check)
    if cfg.http:
        over_http(cfg, argv[:start])
        return
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the protocol's
        box = toolbox(cfg, argv[:start])
    asyncio.run(over_stdio(box))


if __name__ == "__main__":
    config.main(main)
