"""tools/calling/mcp.py: other people's MCP servers, over stdio, streamable HTTP and SSE, as tools.

    pytest tests/test_mcp.py

The servers are real: mcp-server-time and mcp-server-git from PyPI, server-everything and
server-filesystem from npm. make .venv/installed-test installs them; a test skips without them.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("mcp", reason='no MCP here: pip install -e ".[mcp]"')

from mcp import types
from PIL import Image
from ports import free_port
from until import until

from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox, ToolError
from tools.calling import mcp as module

ROOT = Path(__file__).parent.parent
PYPI, NPM = ROOT / ".venv/mcp-servers/bin", ROOT / ".venv/mcp-npm/node_modules/.bin"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def program(folder, name):
    if not (folder / name).exists():
        pytest.skip(f"no {name} in {folder}: make .venv/installed-test installs it")
    if folder is NPM and not shutil.which("node"):
        pytest.skip(f"no node to run {name} with: install Node.js 20 or newer")
    return str(folder / name)


def everything(**more):
    return {"command": program(NPM, "mcp-server-everything"), "args": ["stdio"], **more}


def clock(**more):
    return {"command": program(PYPI, "mcp-server-time"), **more}


@pytest.fixture
def toolbox(tmp_path):
    """toolbox(name={...}): a Toolbox of these servers; options of a Toolbox as `box`."""

    def make(box=None, ask="", **servers):
        file = tmp_path / "servers.json"
        file.write_text(json.dumps({"mcpServers": servers}))
        return Toolbox([f"mcp:{file}{ask}"], **(box or {}))

    return make


@contextlib.asynccontextmanager
async def opened(box):
    session = box.open({})
    try:
        yield session
    finally:
        await session.close()
        await box.close()


def children(pid=None):
    files = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def alive(pids):
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # a zombie, which somebody else has to reap, has no exe
            os.readlink(f"/proc/{pid}/exe")
            found.append(pid)
    return found


def gone(pids):
    return until(lambda: not alive(pids))


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


# -- real servers


def test_an_image_of_a_public_server_is_trained_on(toolbox, tmp_path):
    """In a rollout of a tiny model that sees: mask 0, its pixels in the micro-batch, and what was
    said behind it depends on them."""
    import eyes
    import torch
    from transformers import AutoTokenizer

    import train_grpo
    from chat import Chat
    from engines.scripted import ScriptedEngine
    from learning import model as models
    from learning.batches import Batch
    from learning.vision import find_vision, image_spans
    from rollout import Settings, rollouts

    # 1. the server's image enters a rollout
    box = toolbox(everything=everything(tools=["get-tiny-image"]))
    folder = eyes.folder_of("qwen3_vl", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision = find_vision(folder, tokenizer)
    chat = Chat(tokenizer, "hermes", box.schemas, vision=vision)
    call = '<tool_call>\n{"name": "get-tiny-image", "arguments": {}}\n</tool_call><|im_end|>'
    turns = (call, "A logo.<|im_end|>")
    said = [tokenizer.encode(turn, add_special_tokens=False) for turn in turns]
    example = {"messages": [{"role": "user", "content": "What do you get?"}]}

    async def scene():
        played = await rollouts([example], chat, ScriptedEngine(said), box, Settings())
        async with opened(box) as session:
            content, _, _ = await session.call("get-tiny-image", {})
        return played, content

    (trajectory,), content = run_blocking(scene())
    (sent,) = [part for part in content if isinstance(part, Image.Image)]
    assert trajectory.stop == "answered" and len(trajectory.images) == 1
    assert trajectory.calls[0].error is None and trajectory.calls[0].images == [1]
    picture = trajectory.images[0]
    assert picture.key == vision.prepare(sent).key and sent.width > 8

    # 2. it is context, and its pixels are in the micro-batch
    ((first, end),) = image_spans(trajectory.ids, trajectory.images)
    start, last = trajectory.turn_starts
    assert start < first < end < last and not any(trajectory.mask[first:end])
    assert sum(trajectory.mask) == len(said[0]) + len(said[1])
    trajectory.advantages, trajectory.weight = [0.0, 1.0], 1.0
    model, _ = models.load(folder, "full", device="cpu", train_vision=True)
    (part,) = train_grpo.batches(model, [trajectory], 10**6)
    ((in_batch,),) = Batch.of(part).images
    assert torch.equal(in_batch.pixels["pixel_values"], picture.pixels["pixel_values"])

    # 3. an update reaches the tower by way of it, and another image is another answer
    settings = train_grpo.LearnSettings.of(train_grpo.Config())
    train_grpo.accumulate(model, [trajectory], settings)
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    (right,) = train_grpo.policy_logprobs(model, [trajectory], 1.0, 10**6)
    trajectory.images = [vision.prepare(Image.new("RGB", sent.size, "red"))]
    (wrong,) = train_grpo.policy_logprobs(model, [trajectory], 1.0, 10**6)
    assert torch.equal(right[:first], wrong[:first])
    assert (right - wrong)[last:].abs().max() > 1e-3


@linux
def test_two_servers_from_pypi_and_two_from_npm_over_stdio(toolbox, tmp_path):
    """List, call, image, resource, error; 100 calls at once; no process is left."""
    (tmp_path / "note.txt").write_text("hello")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    before = children()
    box = toolbox(
        time=clock(),
        git={"command": program(PYPI, "mcp-server-git")},
        everything=everything(),
        files={"command": program(NPM, "mcp-server-filesystem"), "args": [str(tmp_path)]},
    )
    assert until(lambda: children() == before)  # listed and stopped
    assert {"get_current_time", "git_status", "get-tiny-image", "read_text_file"} < set(box.tools)
    for tool in box.tools.values():
        assert tool.schema["function"]["parameters"]["type"] == "object"
        assert tool.schema["function"]["description"] and "$schema" not in json.dumps(tool.schema)

    async def scene():
        async with opened(box) as session:

            async def call(name, **arguments):
                content, error, _ = await session.call(name, arguments)
                return content, error

            text, error = await call("get_current_time", timezone="Europe/Berlin")
            assert '"timezone": "Europe/Berlin"' in text and error is None
            text, error = await call("get_current_time", timezone="Mars/Olympus")
            assert "Mars/Olympus" in text and error == "exception"
            text, error = await call("git_status", repo_path=str(tmp_path))
            assert "note.txt" in text and error is None
            assert await call("read_text_file", path=str(tmp_path / "note.txt")) == ("hello", None)
            text, error = await call("read_text_file", path="/etc/passwd")
            assert "outside allowed directories" in text and error == "exception"
            text, error = await call("get-sum", a=1, b="2")
            assert "b must be number" in text and error == "bad_arguments"
            (said, image, _), error = await call("get-tiny-image")
            assert "image" in said and image.size == (20, 20) and error is None
            text, _ = await call("get-resource-reference", resourceType="Text", resourceId=1)
            assert "plaintext resource created" in text
            text, _ = await call("get-resource-links", count=1)
            assert "(a resource demo://" in text and ": not shown)" in text

            calls = [session.call("get-sum", {"a": i, "b": 1}) for i in range(100)]
            texts = [text for text, _, _ in await asyncio.gather(*calls)]
            assert texts == [f"The sum of {i} and 1 is {i + 1}." for i in range(100)]
            servers = children() - before
            assert len(servers) == 4
        assert gone(servers)

    asyncio.run(scene())
    assert box.errors == {"exception": 2, "bad_arguments": 1}


@contextlib.contextmanager
def served(transport, port):
    """server-everything over HTTP, on a port of 127.0.0.1, ready."""
    command = [program(NPM, "mcp-server-everything"), transport]
    env = {"PATH": os.environ["PATH"], "PORT": str(port)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert until(lambda: listens(port))
        yield process
    finally:
        process.kill()
        process.wait()


async def have_been_sent(session):
    """Waits until the server has the calls before this one: it answers what came after them."""
    for _ in range(3):
        assert (await session.call("echo", {"message": "x"}))[:2] == ("Echo: x", None)


def listens(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


@pytest.mark.parametrize("transport", ["streamableHttp", "sse"])
def test_a_server_over_http_is_called_lost_and_found_again(toolbox, transport):
    """Calls in flight, calls while it is away, calls after: an observation each, of its kind."""
    port = free_port()
    server = {"url": f"http://127.0.0.1:{port}/mcp"}
    if transport == "sse":
        server = {"url": f"http://127.0.0.1:{port}/sse", "type": "sse"}

    async def scene():
        with served(transport, port) as process:
            box = toolbox(remote=server, box={"options": ["echo.retries=0"]})
            session = box.open({})
            (_, image, _), _, _ = await session.call("get-tiny-image", {})
            assert image.size == (20, 20)
            assert (await session.call("get-sum", {"a": 1, "b": 2}))[
                0
            ] == "The sum of 1 and 2 is 3."
            calls = [session.call("echo", {"message": str(i)}) for i in range(50)]
            texts = [text for text, _, _ in await asyncio.gather(*calls)]
            assert texts == [f"Echo: {i}" for i in range(50)]
            long = {"duration": 20, "steps": 2}
            calls = [session.call("trigger-long-running-operation", long) for _ in range(3)]
            calls = [asyncio.ensure_future(call) for call in calls]
            await have_been_sent(session)
            process.kill()
            for text, error, _ in await asyncio.gather(*calls):
                assert error == "server" and "'remote' ended during the call" in text
        text, error, _ = await session.call("echo", {"message": "away"})
        assert error == "network" and "'remote' does not answer" in text
        with served(transport, port):
            assert (await session.call("echo", {"message": "back"}))[:2] == ("Echo: back", None)
            await session.close()
            await box.close()

    asyncio.run(scene())


@linux
def test_a_killed_server_is_an_observation_and_is_started_again(toolbox, caplog):
    box = toolbox(everything=everything())
    before = children()

    async def scene():
        async with opened(box) as session:
            assert (await session.call("echo", {"message": "1"}))[1] is None
            long = {"duration": 20, "steps": 2}
            calls = [session.call("trigger-long-running-operation", long) for _ in range(3)]
            calls = [asyncio.ensure_future(call) for call in calls]
            await have_been_sent(session)
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
            for text, error, _ in await asyncio.gather(*calls):
                assert error == "server" and "starts it again, without its state" in text
            assert (await session.call("echo", {"message": "2"}))[:2] == ("Echo: 2", None)
            assert await asyncio.to_thread(until, lambda: len(children() - before) == 1)

    asyncio.run(scene())
    assert until(lambda: children() == before) and box.errors == {"server": 3}
    assert caplog.text.count("the MCP server 'everything' ended") == 1  # the user reads it once


@linux
def test_a_server_that_cannot_be_started_again_is_an_observation_each_time(toolbox, tmp_path):
    """No exception: the trajectory goes on, and may answer without the tool."""
    link = tmp_path / "server"
    link.symlink_to(program(NPM, "mcp-server-everything"))
    box = toolbox(lost={"command": str(link), "args": ["stdio"]})
    before = children()

    async def scene():
        async with opened(box) as session:
            await session.call("echo", {"message": "1"})
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
            link.rename(tmp_path / "aside")
            results = [await session.call("echo", {"message": "2"}) for _ in range(4)]
            assert [error for _, error, _ in results] == ["server"] * 4
            assert all("cannot run" in text for text, _, _ in results[1:])
            (tmp_path / "aside").rename(link)
            assert (await session.call("echo", {"message": "3"}))[:2] == ("Echo: 3", None)

    asyncio.run(scene())


@linux
@pytest.mark.parametrize("kind", ["run", "trajectory"])
def test_a_session_for_the_run_or_for_each_trajectory(toolbox, kind):
    """Pitfall 40: members of a group share no state, if the user says so."""
    box = toolbox(everything=everything(session=kind))
    before = children()

    async def scene():
        sessions = [box.open({}) for _ in range(3)]
        toggled = [(await one.call("toggle-simulated-logging", {}))[0] for one in sessions]
        again, _, _ = await sessions[0].call("toggle-simulated-logging", {})
        began = [text.startswith("Started") for text in [*toggled, again]]
        servers = children() - before
        if kind == "run":
            assert began == [True, False, True, False] and len(servers) == 1
        else:
            assert began == [True, True, True, False] and len(servers) == 3
            await sessions[0].close()
            assert len(alive(servers)) == 2
        for one in sessions:
            await one.close()
        await box.close()
        assert gone(servers)

    asyncio.run(scene())


@linux
def test_a_killed_trainer_leaves_no_server(tmp_path):
    """SIGKILL: no code of ours runs any more, and the servers see the end of their stdin."""
    files = {"command": program(NPM, "mcp-server-filesystem"), "args": [str(tmp_path)]}
    servers = {"time": clock(), "everything": everything(), "files": files}
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": servers}))
    code = f"""if True:
        import asyncio
        from tools import Toolbox
        box = Toolbox(["mcp:{tmp_path}/servers.json"])
        async def scene():
            session = box.open({{}})
            await session.call("get_current_time", {{"timezone": "UTC"}})
            await session.call("get-tiny-image", {{}})
            await session.call("list_allowed_directories", {{}})
            print("ready", flush=True)
            await asyncio.sleep(60)
        asyncio.run(scene())"""
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert trainer.stdout.readline() == b"ready\n"
        running = children(trainer.pid)
        assert len(running) == 3
    finally:
        trainer.kill()
        trainer.wait()
    assert gone(running)


def test_several_event_loops_one_after_the_other_and_a_running_one(toolbox):
    """Each asyncio.run is a loop of its own; a notebook's runs while a Toolbox is made."""
    box = toolbox(everything=everything())

    async def scene(box):
        return (await box.open({}).call("echo", {"message": "x"}))[0]

    assert [asyncio.run(scene(box)) for _ in range(2)] == ["Echo: x", "Echo: x"]

    async def notebook():
        box = toolbox(everything=everything())
        assert await scene(box) == "Echo: x"
        await box.close()

    asyncio.run(notebook())


def test_a_call_past_its_deadline_leaves_the_session_usable(toolbox):
    options = ["trigger-long-running-operation.timeout=1"]
    box = toolbox(everything=everything(), box={"options": options})

    async def scene():
        async with opened(box) as session:
            await session.call("echo", {"message": "start"})
            long = {"duration": 30, "steps": 2}
            _, error, _ = await session.call("trigger-long-running-operation", long)
            assert error == "timeout"
            assert (await session.call("echo", {"message": "x"}))[:2] == ("Echo: x", None)

    asyncio.run(scene())
    assert box.leaked == 0


def test_names_filter_and_clashes(toolbox):
    box = toolbox(a=everything(tools=["echo"]), b=everything(tools=["echo", "get-sum"]))
    assert set(box.tools) == {"a_echo", "b_echo", "get-sum"}
    assert {schema["function"]["name"] for schema in box.schemas} == set(box.tools)

    async def scene():
        async with opened(box) as session:
            assert (await session.call("b_echo", {"message": "x"}))[:2] == ("Echo: x", None)

    asyncio.run(scene())
    one = toolbox(ask=":a", a=everything(tools=["echo"]), b={"command": "no-such-program"})
    assert list(one.tools) == ["echo"]  # b is not started
    with pytest.raises(UserError, match=r"has no tool 'ecko': did you mean echo\?"):
        toolbox(x=everything(tools=["ecko"]))


def test_variables_are_expanded_and_a_server_sees_no_secret(toolbox, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abc")
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    env = {"GIVEN": "Bearer ${MY_TOKEN}", "DEFAULT": "${NOT_THERE:-none}"}
    box = toolbox(everything=everything(env=env))

    async def scene():
        async with opened(box) as session:
            return json.loads((await session.call("get-env", {}))[0])

    seen = asyncio.run(scene())
    assert (seen["GIVEN"], seen["DEFAULT"]) == ("Bearer abc", "none")
    assert "SECRET_KEY" not in seen and "MY_TOKEN" not in seen


NEWEST = """
import anyio
from mcp import MCPError, types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

async def list_tools(ctx, params):
    tools = [types.Tool(name=n, input_schema={"type": "object"}) for n in ("version", "fail")]
    page = int(params.cursor or 0)
    return types.ListToolsResult(tools=[tools[page]], next_cursor=None if page else "1")

async def call_tool(ctx, params):
    if params.name == "fail":
        raise MCPError(-32000, "try again later")
    return types.CallToolResult(content=[types.TextContent(type="text", text=ctx.protocol_version)])

async def no_handshake(ctx, call_next):
    if ctx.method == "initialize":
        raise MCPError(types.UNSUPPORTED_PROTOCOL_VERSION, "no", {"supported": ["2026-07-28"]})
    return await call_next(ctx)

async def main():
    server = Server("newest", on_list_tools=list_tools, on_call_tool=call_tool)
    server.middleware.append(no_handshake)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())

anyio.run(main)
"""


def test_a_server_without_the_handshake_pages_of_tools_and_errors_of_the_protocol(toolbox):
    """A server of the newest protocol alone, made with the official SDK. An error it answers with
    is no loss of the server, even with the code that the SDK has for one."""
    box = toolbox(newest={"command": sys.executable, "args": ["-c", NEWEST]})
    assert list(box.tools) == ["version", "fail"]

    async def scene():
        async with opened(box) as session:
            assert (await session.call("version", {}))[:2] == ("2026-07-28", None)
            results = [(await session.call("fail", {}))[:2] for _ in range(2)]
            assert results == [("error: try again later", "exception")] * 2

    asyncio.run(scene())


@pytest.fixture
def scripted():
    """An MCP server over HTTP whose tool answers with the HTTP status, or the JSON-RPC error code,
    that it is asked for; .seen: the methods and the tokens that came. .tools, .result: what it
    offers and returns. .session: the one that it knows, and .no_session(handler, answer) is what it
    says to another."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            """Says nothing."""

        def reply(self, status, said=None):
            text = b"" if said is None else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json" if text else "text/plain")
            self.send_header("content-length", str(len(text)))
            if server.session:
                self.send_header("mcp-session-id", server.session)
            self.end_headers()
            self.wfile.write(text)

        def do_DELETE(self):
            self.reply(200)

        def do_GET(self):
            self.reply(405)

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.seen.append((asked["method"], self.headers["authorization"]))
            if "id" not in asked:
                return self.reply(202)
            knows = asked["method"] == "initialize" or server.session is None
            if not knows and self.headers["mcp-session-id"] != server.session:
                return server.no_session(self, {"jsonrpc": "2.0", "id": asked["id"]})
            given = asked.get("params", {}).get("arguments", {})
            if "status" in given:
                return self.reply(given["status"])
            said = {"jsonrpc": "2.0", "id": asked["id"]}
            if "code" in given:
                return self.reply(200, said | {"error": {"code": given["code"], "message": "own"}})
            results = {
                "initialize": {
                    "protocolVersion": "2025-06-18",
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "scripted", "version": "1"},
                },
                "tools/list": {"tools": server.tools},
                "tools/call": server.result,
            }
            self.reply(200, said | {"result": results[asked["method"]]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.seen = True, []
    whole = {"type": "object", "additionalProperties": True}
    server.tools = [{"name": "do", "inputSchema": whole}]
    server.result = {"content": [{"type": "text", "text": "done"}]}
    server.session = None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/mcp"
    yield server
    server.shutdown()
    server.server_close()


def test_an_error_that_is_the_servers_own_or_a_busy_server_is_no_loss_of_it(toolbox, scripted):
    """Pitfall 41: nobody else's call is lost, and the connection is looked at only where an error
    may mean that it is dead."""
    box = toolbox(x={"url": scripted.url}, box={"options": ["do.retries=0"]})
    scripted.seen.clear()

    async def scene():
        async with opened(box) as session:

            async def call(**asked):
                return (await session.call("do", asked))[:2]

            assert await call() == ("done", None)
            before = [method for method, _ in scripted.seen]
            assert await call(code=-32602) == ("error: own", "exception")
            assert await call(code=7) == ("error: own", "exception")
            text, error = await call(status=503)
            assert error == "network" and "'x' is busy (HTTP 503" in text
            assert [m for m, _ in scripted.seen[len(before) :]] == ["tools/call"] * 3
            assert await call(code=-32603) == ("error: own", "exception")  # though it was busy
            assert (await asyncio.gather(call(status=429), call(), call(code=-32603)))[1:] == [
                ("done", None),
                ("error: own", "exception"),
            ]
            methods = [method for method, _ in scripted.seen]
            assert methods.count("initialize") == 1 and methods.count("tools/list") == 3

    asyncio.run(scene())


def test_a_token_is_sent_without_what_a_file_with_crlf_adds_and_is_in_no_message(
    toolbox, scripted, monkeypatch
):
    server = {"url": scripted.url, "headers": {"Authorization": "Bearer ${MY_TOKEN}"}}
    monkeypatch.setenv("MY_TOKEN", "my-secret\r\n")
    toolbox(x=server)
    assert {token for _, token in scripted.seen} == {"Bearer my-secret"}
    monkeypatch.setenv("MY_TOKEN", "my-\nsecret")
    with pytest.raises(UserError, match="a value that cannot be sent .*: correct its head") as seen:
        toolbox(x=server)
    assert "secret" not in str(seen.value)


def test_a_call_has_as_long_as_the_server_that_it_may_have_to_start(toolbox, scripted):
    tools = [
        toolbox({"timeout": 10.0, "options": options}, x={"url": scripted.url, **more}).tools["do"]
        for options, more in (
            ([], {"start_timeout": 30}),
            ([], {"start_timeout": 5}),
            (["do.timeout=2"], {"start_timeout": 30}),
        )
    ]
    assert [tool.timeout for tool in tools] == [30, 10, 2]  # of the second one the Toolbox's


# -- what is refused


REFUSED = {
    '{"mcpServers": {"x": {"comand": "x"}}}': r"unknown key 'comand': did you mean command\?",
    '{"servers": {}}': "unknown key 'servers' in .*expected",
    '{"mcpServers": {}}': "no server in",
    "{": "is no JSON",
    "[]": "no server in",
    '{"mcpServers": {"x": 3}}': 'expected {"command": …} or',
    '{"mcpServers": {"x": {"args": []}}}': "expected one of command and url",
    '{"mcpServers": {"x": {"command": "x", "url": "http://x"}}}': "expected one of command and url",
    '{"mcpServers": {"x": {"command": "x", "args": "y"}}}': 'args = "y": expected a list of texts',
    '{"mcpServers": {"x": {"command": "x", "headers": {}}}}': "headers has no effect beside",
    '{"mcpServers": {"x": {"command": "x", "cwd": "/nope"}}}': "cwd = '/nope' is no folder",
    '{"mcpServers": {"x": {"command": "x", "type": "http"}}}': "type = 'http': expected stdio",
    '{"mcpServers": {"x": {"url": "http://x", "type": "ssh"}}}': "expected http or sse",
    '{"mcpServers": {"x": {"url": "localhost:80"}}}': "expected http:// or https://",
    '{"mcpServers": {"x": {"command": "x", "session": "runs"}}}': "expected run or trajectory",
    '{"mcpServers": {"x": {"command": "x", "start_timeout": true}}}': "expected a number above 0",
    '{"mcpServers": {"x": {"command": "x", "env": {"A": "${NOT_THERE}"}}}}': "no variable 'NOT_T",
    '{"mcpServers": {"x": {"command": "x", "disabled": true}}}': "every server .* is disabled",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "servers.json").write_text(text)
    with pytest.raises(UserError, match=REFUSED[text]) as caught:
        module.load(str(tmp_path / "servers.json"), None, 10.0)
    assert "\n" not in str(caught.value)


def test_a_file_or_a_server_that_is_not_there_is_named(toolbox):
    with pytest.raises(UserError, match="cannot read .*nope.json.*No such file"):
        Toolbox(["mcp:nope.json"])
    with pytest.raises(UserError, match=r"no server 'tine': did you mean time\?"):
        toolbox(ask=":tine", time={"command": "x"})


def shell(code, **more):
    return {"command": "sh", "args": ["-c", code], **more}


STARTS = {
    "no program": ({"command": "no-such-program"}, "cannot run 'no-such-program': .*install it"),
    "ends": (shell("echo oh no >&2; exit 3"), "ended at once, saying 'oh no': try `sh -c 'echo"),
    "hangs": (shell("sleep 61", start_timeout=0.5), 'no answer in 0.5 s: .*"start_timeout"'),
    "chatters": (shell("yes", start_timeout=0.5), "no answer in 0.5 s"),
    "refused": ({"url": "http://127.0.0.1:1/mcp"}, "from http://127.0.0.1:1/mcp: start it, or"),
    "refused sse": ({"url": "http://127.0.0.1:1/s", "type": "sse"}, "127.0.0.1:1/s: start it, or"),
}


@linux
@pytest.mark.parametrize("name", STARTS)
def test_a_server_that_does_not_start_is_an_error_of_one_sentence(toolbox, name, capfd):
    server, message = STARTS[name]
    before = children()
    with pytest.raises(UserError, match=message) as caught:
        toolbox(x=server)
    assert str(caught.value).startswith("MCP server 'x' of ") and "\n" not in str(caught.value)
    assert gone(children() - before)
    assert capfd.readouterr() == ("", "")  # neither the server's stderr nor the SDK's tracebacks


def test_the_page_of_another_program_at_the_url_is_an_error(toolbox, tmp_path):
    """HTTP 404 or 501 of a web server: no MCP there."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    web = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert until(lambda: listens(port))
        with pytest.raises(UserError, match=r"HTTP 501 from http://127.*: correct its url"):
            toolbox(x={"url": f"http://127.0.0.1:{port}/mcp"})
    finally:
        web.kill()
        web.wait()


def test_a_missing_package_is_an_error_with_the_pip_line():
    code = "import sys; sys.modules['mcp'] = None; from tools.calling import mcp"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        "UserError: MCP needs a package" in done.stderr and 'pip install -e ".[mcp]"' in done.stderr
    )


# -- schemas and results


def test_a_schema_is_made_plain_for_a_chat_template():
    """$ref is replaced, a schema within itself ends; arguments may have the names of keywords."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Arguments",
        "properties": {
            "title": {"title": "Title", "type": "string"},
            "$ref": {"type": "integer", "default": {"$ref": "a value"}},
            "where": {"$ref": "#/$defs/Point", "description": "here"},
            "tree": {"$ref": "#/$defs/Tree"},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "many": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
            "old": {"type": ["string", "null"]},
            "away": {"$ref": "https://example.org/x.json"},
        },
        "$defs": {
            "Point": {"type": "object", "properties": {"x": {"type": "number"}}},
            "Tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}}},
        },
    }
    assert module.parameters(schema) == {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "$ref": {"type": "integer", "default": {"$ref": "a value"}},
            "where": {
                "type": "object",
                "properties": {"x": {"type": "number"}},
                "description": "here",
            },
            "tree": {"type": "object", "properties": {"left": {}}},
            "limit": {"type": "integer", "default": None, "nullable": True},
            "many": {"anyOf": [{"type": "integer"}, {"type": "string"}], "nullable": True},
            "old": {"type": "string", "nullable": True},
            "away": {},
        },
    }
    assert module.parameters({}) == {"type": "object", "properties": {}}
    options = {"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert module.parameters(options)["additionalProperties"] is True


def result(*blocks, **more):
    return module.content(types.CallToolResult(content=list(blocks), **more))


def block(kind, data, mime):
    made = types.ImageContent if kind == "image" else types.AudioContent
    return made(type=kind, data=base64.b64encode(data).decode(), mime_type=mime)


def test_every_kind_of_content_becomes_text_or_an_image():
    text = types.TextContent(type="text", text="hi")
    assert result(text, text) == "hi\nhi"
    assert result() is None
    assert result(structured_content={"a": [1]}) == '{"a": [1]}'
    assert result(text, structured_content={"a": 1}) == "hi"
    said, image = result(text, block("image", PIXEL, "image/png"))
    assert said == "hi" and isinstance(image, Image.Image) and image.size == (1, 1)
    assert result(block("audio", b"x", "audio/wav")) == "(a resource of type audio/wav: not shown)"
    assert "cannot be read" in result(block("image", b"no image", "image/png"))
    assert "cannot be read" in result(block("image", PIXEL[:40], "image/png"))
    broken = PIXEL[:33] + b"\0\0\0\1iCCP?0000" + PIXEL[33:]  # a colour profile of a wrong checksum
    assert result(block("image", broken, "image/png"))[0].size == (1, 1)
    blob = types.BlobResourceContents(uri="a://b", blob="AA==", mime_type="application/zip")
    embedded = types.EmbeddedResource(type="resource", resource=blob)
    assert result(embedded) == "(a resource a://b of type application/zip: not shown)"


def test_an_error_of_the_server_has_its_words():
    with pytest.raises(ToolError, match="^no such city$") as caught:
        result(types.TextContent(type="text", text="no such city"), is_error=True)
    assert caught.value.kind == "exception"
    with pytest.raises(ToolError, match="does not say why"):
        result(is_error=True)


# -- B3: what servers do that MCP does not say


NOT_FOUND = {"code": -32001, "message": "Session not found"}
NO_SESSION = {
    "404 and no text": lambda handler, said: handler.reply(404),
    "404 and -32001": lambda handler, said: handler.reply(404, said | {"error": NOT_FOUND}),
    "404 without an id": lambda handler, said: handler.reply(
        404, said | {"id": None, "error": NOT_FOUND}
    ),
    "200 and -32001": lambda handler, said: handler.reply(200, said | {"error": NOT_FOUND}),
    "400 and words": lambda handler, said: handler.reply(
        400, said | {"error": {"code": -32000, "message": "Bad Request: No valid session ID"}}
    ),
    "200, expired": lambda handler, said: handler.reply(
        200, said | {"error": {"code": -32600, "message": "the session has expired"}}
    ),
}


@pytest.mark.parametrize("way", NO_SESSION)
def test_a_server_that_has_forgotten_the_session_is_connected_again(toolbox, scripted, way):
    """B3: it was started anew, say. The model is told, as its state is lost; then all is well."""
    scripted.session = "1"
    scripted.no_session = NO_SESSION[way]
    box = toolbox(x={"url": scripted.url}, box={"options": ["do.retries=0"]})

    async def scene():
        async with opened(box) as session:

            async def call(**asked):
                return (await session.call("do", asked))[:2]

            assert await call() == ("done", None)
            for session_id in ("2", "3"):
                scripted.session = session_id
                text, error = await call()
                assert error == "server" and text.endswith("starts it again, without its state")
                assert await asyncio.gather(*(call() for _ in range(4))) == [("done", None)] * 4
            # its own error, which only speaks of something else
            assert await call(code=-32001) == ("error: own", "exception")
            before = len(scripted.seen)
            assert await call() == ("done", None)
            assert [method for method, _ in scripted.seen[before:]] == ["tools/call"]

    asyncio.run(scene())


def test_calls_at_once_that_lose_a_session_make_one_new_connection(toolbox, scripted):
    """B3."""
    scripted.session = "1"
    scripted.no_session = NO_SESSION["200 and -32001"]
    box = toolbox(x={"url": scripted.url}, box={"options": ["do.retries=0"]})

    async def scene():
        async with opened(box) as session:
            await session.call("do", {})
            before = [method for method, _ in scripted.seen].count("initialize")
            scripted.session = "2"
            results = await asyncio.gather(*(session.call("do", {"n": n}) for n in range(4)))
            assert {error for _, error, _ in results} <= {"server", None}
            results = await asyncio.gather(*(session.call("do", {"n": n}) for n in range(4)))
            assert [result[:2] for result in results] == [("done", None)] * 4
            assert [method for method, _ in scripted.seen].count("initialize") == before + 1

    asyncio.run(scene())


GO = {  # as Go writes what is not set
    "type": "object",
    "properties": {
        "a": {"type": "string", "enum": None, "anyOf": None, "items": None, "required": None},
        "b": {"type": None, "default": None, "properties": None, "description": None},
        "c": None,
        "d": {"anyOf": [{"type": "integer"}, {"type": None}], "$ref": None, "format": None},
        "e": {"type": ["null"]},
    },
    "required": None,
    "additionalProperties": None,
    "$defs": None,
}


def test_null_in_a_schema_is_what_is_not_there(toolbox, scripted):
    """B3."""
    made = module.parameters(GO)
    assert made == {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {"default": None},
            "c": {},
            "d": {"anyOf": [{"type": "integer"}, {}]},
            "e": {"type": ["null"]},
        },
    }
    for schema in (None, {}, {"type": None}, {"properties": None, "required": None}):
        assert module.parameters(schema or {}) == {"type": "object", "properties": {}}
    scripted.tools = [
        {"name": "go", "description": None, "title": None, "inputSchema": GO, "annotations": None},
        {"name": "none", "inputSchema": None},
        {"name": "outputs", "inputSchema": {}, "outputSchema": {"type": None}},
    ]
    box = toolbox(x={"url": scripted.url})
    assert set(box.tools) == {"go", "none", "outputs"}
    assert box.tools["go"].schema["function"]["parameters"] == made

    async def scene():
        async with opened(box) as session:
            assert (await session.call("go", {"a": "x", "d": 3}))[:2] == ("done", None)
            assert (await session.call("none", {}))[:2] == ("done", None)

    asyncio.run(scene())


@pytest.mark.parametrize(
    "bad, why",
    [
        ({"name": "bad", "inputSchema": [1]}, "'bad' .its inputSchema is .1.: expected an object"),
        ({"name": "bad", "inputSchema": "none"}, "expected an object"),
        ({"name": None, "inputSchema": {}}, "tool 1 .it has no name"),
        ({"name": 7, "inputSchema": {}}, "tool 7 "),
        ({"name": "bad", "description": ["a"], "inputSchema": {}}, "tool 'bad' "),
        ("bad", "tool 1 "),
    ],
)
def test_one_bad_tool_is_left_out_and_named_and_the_others_stay(
    toolbox, scripted, caplog, bad, why
):
    """B3."""
    scripted.tools.insert(0, bad)
    with caplog.at_level("WARNING"):
        box = toolbox(x={"url": scripted.url})
    assert set(box.tools) == {"do"}
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.message]
    assert "MCP server 'x'" in line and re.search(why, line), line

    async def scene():
        async with opened(box) as session:
            assert (await session.call("do", {}))[:2] == ("done", None)

    asyncio.run(scene())


SPEAKS = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    said = {"jsonrpc": "2.0", "id": asked["id"]}
    if asked["method"] == "initialize":
        said["result"] = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                          "serverInfo": {"name": "x", "version": "1"}}
    else:
        said.update(ANSWER)
    print(json.dumps(said), flush=True)
"""


@pytest.mark.parametrize(
    "answer, shown",
    [
        ({"result": {"tools": None}}, "its answer is not what MCP expects, at tools: .*not None"),
        ({"result": {}}, "its answer is not what MCP expects, at tools: Field required"),
        ({"result": {"tools": {"do": 1}}}, "its answer is not what MCP expects, at tools"),
        (
            {"error": {"code": 5, "message": "no licence"}},
            "it answered with the error 'no licence'",
        ),
    ],
)
def test_a_live_server_with_a_bad_answer_is_told_from_one_that_ended(toolbox, answer, shown):
    """B3."""
    code = SPEAKS.replace("ANSWER", repr(answer))
    with pytest.raises(UserError, match=shown) as caught:
        toolbox(x={"command": sys.executable, "args": ["-c", code]})
    assert "ended" not in str(caught.value)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", ["x", {"y": "\ud83d"}], {"\udc00": 1}])
def test_half_a_character_in_an_argument_fails_that_call_alone(toolbox, scripted, text):
    """B3: it killed the connection of all."""
    box = toolbox(x={"url": scripted.url})

    async def scene():
        async with opened(box) as session:
            calls = [session.call("do", {"x": value}) for value in ("é", text, "\U0001f600")]
            good, bad, other = await asyncio.gather(*calls)
            assert good[:2] == other[:2] == ("done", None)
            assert bad[1] == "bad_arguments" and "half a character" in bad[0]
            assert [method for method, _ in scripted.seen].count("initialize") == 2

    asyncio.run(scene())


@pytest.mark.parametrize("structured", [{"n": "seven"}, {}, [7], None, "seven", 7])
def test_a_text_beside_structured_content_that_is_wrong_is_kept(toolbox, scripted, structured):
    """B3."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    scripted.tools[0]["outputSchema"] = schema
    scripted.result["structuredContent"] = structured
    box = toolbox(x={"url": scripted.url})

    async def scene():
        async with opened(box) as session:
            assert (await session.call("do", {}))[:2] == ("done", None)
            if structured is not None:
                for content in ([], None):
                    scripted.result = {"content": content, "structuredContent": structured}
                    text = json.dumps(structured)
                    assert (await session.call("do", {}))[:2] == (text, None)
            for result in ({"content": 7}, {"content": [{"type": "smell"}]}, {"content": ["x"]}):
                scripted.result = result
                text, error, _ = await session.call("do", {})
                assert error == "exception" and "its answer is not what MCP expects" in text
            scripted.result = {"content": [{"type": "text", "text": "well"}]}
            assert (await session.call("do", {}))[:2] == ("well", None)
            assert [method for method, _ in scripted.seen].count("initialize") == 2

    asyncio.run(scene())


def test_names_that_cleaning_makes_equal_are_numbered(toolbox, scripted):
    """B3."""
    names = ["a.b", "a/b", "a_b", "x" * 70 + "1", "x" * 70 + "2", "é", "ü", "a_b_2"]
    scripted.tools = [{"name": name, "inputSchema": {}} for name in names]
    box = toolbox(x={"url": scripted.url})
    x = "x" * 62
    assert list(box.tools) == ["a_b", "a_b_2", "a_b_3", f"{x}xx", f"{x}_2", "_", "__2", "a_b_2_2"]
    for name, tool in box.tools.items():
        assert tool.schema["function"]["name"] == name
    both = toolbox(x={"url": scripted.url}, y={"url": scripted.url})
    assert len(both.tools) == 2 * len(names)
    assert {"x_a_b", "x_a_b_2", "y_a_b"} <= set(both.tools)
