"""serve/mcp_server.py: our tools as an MCP server, driven by the official client and by our own.

    pytest tests/test_serve.py

Every server is a process of its own, as a user starts it; HTTP is on a free port of 127.0.0.1.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

pytest.importorskip("mcp", reason='no MCP here: pip install -e ".[mcp]"')

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from until import PATIENCE, until

from run.config import UserError
from serve import mcp_server as serve
from serve import web
from tools import Toolbox

ROOT = Path(__file__).parent.parent
TOOLS = '''
import os
import sys
from PIL import Image
from run.config import UserError

print("stdout of an import")


def picture(colour: str):
    """Draw a small picture.

    Args:
        colour: its colour
    """
    print("stdout of a tool")
    return ["a picture", Image.new("RGB", (8, 6), colour)]


def noise():
    """Draw a large picture."""
    return Image.effect_noise((1100, 1100), 100)


async def double(number: int) -> str:
    """Double a number.

    Args:
        number: any
    """
    return str(number * 2)


class counter:
    """Counts within a session."""

    def __init__(self, log: str = ""):
        self.count, self.log = 0, log

    async def __call__(self, step: int) -> str:
        """Add to the count.

        Args:
            step: how much
        """
        self.count += step
        return str(self.count)

    def close(self):
        if self.count:
            with open(self.log, "a") as file:
                file.write(f"closed at {self.count}\\n")


class file:
    """Reads a file that there has to be, for each session."""

    def __init__(self, path: str):
        if not os.path.exists(path):
            raise UserError(f"there is no {path}")
        if path == "/":
            raise IsADirectoryError("a folder")
        self.path = path

    def __call__(self) -> str:
        """Read."""
        with open(self.path) as file:
            return file.read()
'''


@pytest.fixture(scope="module")
def tools_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "my_tools.py"
    path.write_text(TOOLS)
    return path


@pytest.fixture(scope="module")
def counts(tools_file):
    """Where the counter of `stateful` writes."""
    return tools_file.with_name("counts")


@pytest.fixture(scope="module")
def text_file(tools_file):
    """What the tool `file` of `stateful` reads."""
    path = tools_file.with_name("text")
    path.write_text("hello")
    return path


def command(tools_file, names, *arguments):
    named = [f"{tools_file}:{name}" for name in names]
    return [sys.executable, "-m", "serve.mcp_server", *named, *arguments]


@contextlib.contextmanager
def http(tools_file, names, *arguments, token="", port=0):
    """A server over HTTP -> its process and its URL."""
    started = command(tools_file, names, "--http", f"--port={port}", *arguments)
    env = {**os.environ, "NANOTOOL_TOKEN": token}
    process = subprocess.Popen(started, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("serving "):
                break
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def remote(tools_file):
    """A server that several tests share: with a token, its tools have no state."""
    token = "the secret\r\n"  # as a file with CRLF gives it
    with http(tools_file, ["picture", "noise", "double"], token=token) as (_, url):
        yield url


@pytest.fixture(scope="module")
def stateful(tools_file, counts, text_file):
    """Another one, whose tools have a state for each session."""
    options = f"--tool_options=counter.log={counts},file.path={text_file}"
    with http(tools_file, ["counter", "file", "double"], options) as (_, url):
        yield url


@contextlib.asynccontextmanager
async def client(url, token="the secret", mode="auto"):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=PATIENCE) as session:
        async with Client(streamable_http_client(url, http_client=session), mode=mode) as made:
            yield made


def text_of(result):
    assert [block.type for block in result.content] == ["text"]
    return result.content[0].text


async def check_all(made):
    """List, call, image, errors, 100 calls at once, in the words of the official client."""
    listed = {tool.name: tool for tool in (await made.list_tools()).tools}
    assert {"picture", "double"} <= set(listed)
    assert listed["double"].description == "Double a number."
    assert listed["double"].input_schema == {
        "type": "object",
        "properties": {"number": {"type": "integer", "description": "any"}},
        "required": ["number"],
    }
    result = await made.call_tool("double", {"number": 21})
    assert (text_of(result), result.is_error) == ("42", False)
    result = await made.call_tool("picture", {"colour": "red"})
    text, image = result.content
    assert (text.text, image.type, image.mime_type) == ("a picture", "image", "image/png")
    image = Image.open(io.BytesIO(base64.b64decode(image.data)))
    assert image.size == (8, 6) and image.getpixel((0, 0)) == (255, 0, 0)
    for name, arguments, said in (
        ("double", {"number": "x"}, "number must be integer"),
        ("double", {}, "got no argument 'number'"),
        ("picture", {"colour": "no colour"}, "ValueError: unknown color"),
        ("nope", {}, "there is no tool 'nope'"),
    ):
        result = await made.call_tool(name, arguments)
        assert result.is_error and said in text_of(result)
    results = await asyncio.gather(*(made.call_tool("double", {"number": i}) for i in range(100)))
    assert [text_of(result) for result in results] == [str(2 * i) for i in range(100)]


def test_the_official_client_over_stdio(tools_file, tmp_path):
    """The newest protocol, without a handshake. The state is the process's."""
    log = tmp_path / "log"
    option = f"--tool_options=counter.log={log}"
    program, *arguments = command(tools_file, ["double", "picture", "counter"], "--stdio", option)

    async def scene():
        parameters = StdioServerParameters(command=program, args=arguments, cwd=ROOT)
        with open(os.devnull, "w") as errors:
            async with Client(stdio_client(parameters, errors)) as made:
                assert made.protocol_version == "2026-07-28"
                await check_all(made)
                counts = [text_of(await made.call_tool("counter", {"step": 2})) for _ in range(2)]
                assert counts == ["2", "4"]

    asyncio.run(scene())
    assert log.read_text() == "closed at 4\n"


def test_over_stdio_stdout_holds_the_protocol_and_nothing_else(tools_file):
    """What an import or a tool prints goes to stderr; the end of stdin ends the server. By hand,
    with the handshake of older clients."""
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}}
    hello["clientInfo"] = {"name": "test", "version": "1"}
    call = {"name": "picture", "arguments": {"colour": "red"}}
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
    ]
    process = subprocess.Popen(
        command(tools_file, ["picture"], "--stdio"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.writelines(json.dumps(message) + "\n" for message in messages)
    process.stdin.flush()
    lines = [process.stdout.readline() for _ in range(2)]
    rest, stderr = process.communicate(timeout=PATIENCE)
    answers = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert [answer["id"] for answer in answers] == [1, 2]
    assert answers[1]["result"]["content"][1]["mimeType"] == "image/png"
    assert "stdout of an import" in stderr and "stdout of a tool" in stderr
    assert process.returncode == 0


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_the_official_client_over_http(remote, mode):
    async def scene():
        async with client(remote, mode=mode) as made:
            await check_all(made)

    asyncio.run(scene())


def test_a_missing_or_wrong_token_is_401(remote):
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"Accept": "application/json, text/event-stream"}
    for given in ({}, {"Authorization": "Bearer the Secret"}, {"Authorization": "the secret"}):
        answer = httpx2.post(remote, json=body, headers={**accept, **given})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": "Bearer the secret"}
    assert httpx2.post(remote, json=body, headers={**accept, **right}).status_code == 200
    foreign = {**accept, **right, "Host": "evil.example"}  # a web page by DNS rebinding
    assert httpx2.post(remote, json=body, headers=foreign).status_code == 421


def mcp_file(tmp_path, url):
    server = {"url": url, "headers": {"Authorization": "Bearer ${MY_TOKEN}"}}
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"ours": server}}))
    return f"mcp:{tmp_path}/servers.json"


def test_our_client_gives_its_token_and_is_told_when_it_is_wrong(remote, tmp_path, monkeypatch):
    file = mcp_file(tmp_path, remote)
    monkeypatch.setenv("MY_TOKEN", "wrong")
    with pytest.raises(UserError, match="HTTP 401 from .*: give its token in headers") as caught:
        Toolbox([file])
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("MY_TOKEN", "the secret")
    box = Toolbox([file], concurrency=100)

    async def scene():
        session = box.open({})
        content, error, _ = await session.call("picture", {"colour": "blue"})
        assert content[1].getpixel((0, 0)) == (0, 0, 255) and error is None
        text, error, _ = await session.call("picture", {"colour": "no colour"})
        assert "unknown color" in text and error == "exception"
        large, error, _ = await session.call("noise", {})  # more than a MiB
        assert large[0].size == (1100, 1100) and error is None
        calls = [box.open({}).call("double", {"number": i}) for i in range(100)]
        assert [text for text, _, _ in await asyncio.gather(*calls)] == [
            str(2 * i) for i in range(100)
        ]
        await session.close()
        await box.close()

    asyncio.run(scene())


def test_sessions_have_a_state_each_and_close_it(stateful, counts):
    """Pitfall 40, for two clients of one server; by each protocol that the client may know."""

    async def scene():
        async with client(stateful, mode="legacy") as one, client(stateful, mode="auto") as other:
            for step, count in ((1, "1"), (1, "2"), (3, "5")):
                assert text_of(await one.call_tool("counter", {"step": step})) == count
            assert text_of(await other.call_tool("counter", {"step": 10})) == "10"

    asyncio.run(scene())
    assert until(lambda: counts.exists() and len(counts.read_text().splitlines()) == 2)
    assert sorted(counts.read_text().splitlines()) == ["closed at 10", "closed at 5"]


def test_a_server_killed_and_restarted_on_its_port_is_found_again(
    tools_file, tmp_path, monkeypatch
):
    """The new process does not know the session: one call is told so, and the next has a new one.
    It ends by SIGTERM. (What calls in flight and calls while it is away get: test_mcp.py.)"""
    monkeypatch.setenv("MY_TOKEN", "abc")
    option = f"--tool_options=counter.log={tmp_path}/log"
    port = free_port()

    async def scene():
        with http(tools_file, ["counter"], option, token="abc", port=port) as (_, url):
            box = Toolbox([mcp_file(tmp_path, url)])
            session = box.open({})
            assert (await session.call("counter", {"step": 5}))[:2] == ("5", None)
        with http(tools_file, ["counter"], option, token="abc", port=port) as (process, again):
            assert again == url
            text, error, _ = await session.call("counter", {"step": 1})
            assert error == "server" and "without its state" in text
            assert (await session.call("counter", {"step": 2}))[:2] == ("2", None)
            await session.close()
            await box.close()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=PATIENCE)

    asyncio.run(scene())


# -- what is refused


def refused(monkeypatch, *arguments, token=""):
    monkeypatch.setenv("NANOTOOL_TOKEN", token)
    with pytest.raises(UserError) as caught:
        serve.main(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_served_is_refused_in_a_sentence(tools_file, monkeypatch):
    assert "one of --stdio and --http" in refused(monkeypatch, "python")
    assert "one of --stdio and --http" in refused(monkeypatch, "python", "--stdio", "--http")
    assert "no tool is named" in refused(monkeypatch, "--stdio")
    assert "unknown tool 'pyton'" in refused(monkeypatch, "pyton", "--stdio")
    assert "port has no effect over stdio" in refused(monkeypatch, "x", "--stdio", "--port=1")
    assert "tool_concurrency = 0" in refused(monkeypatch, "x", "--http", "--tool_concurrency=0")
    assert "port = 70000" in refused(monkeypatch, "x", "--http", "--port=70000")
    said = refused(monkeypatch, "x", "--http", "--host=0.0.0.0")
    assert "lets other machines in: set the environment variable NANOTOOL_TOKEN" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = f"--port={taken.getsockname()[1]}"
        said = refused(monkeypatch, f"{tools_file}:double", "--http", port)
        assert "cannot listen at 127.0.0.1:" in said and "give another --port" in said


def test_a_tool_that_no_session_could_have_is_refused_at_the_start(tools_file, monkeypatch):
    """Not served, for every call of it to fail."""
    for way in "--stdio", "--http":
        name, option = f"{tools_file}:file", "--tool_options=file.path="
        assert "there is no /nope" in refused(monkeypatch, name, way, option + "/nope")
        said = refused(monkeypatch, name, way, option + "/")
        assert said == "tool 'file' cannot be made: IsADirectoryError: a folder"


def test_what_is_gone_later_is_an_error_of_the_call(stateful, text_file):
    async def scene():
        async with client(stateful, mode="legacy") as one:
            text_file.unlink()
            result = await one.call_tool("file", {})
            assert result.is_error and text_of(result) == f"error: there is no {text_file}"
            assert text_of(await one.call_tool("double", {"number": 2})) == "4"

    asyncio.run(scene())


def test_help_is_printed(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "serve.mcp_server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "token_env" in done.stdout and "--stdio" in done.stdout


# -- C7: requests that do not come to their end


@contextlib.asynccontextmanager
async def impatient(monkeypatch, app, seconds):
    """A server with our settings, in this process; its port."""
    monkeypatch.setattr(web, "REQUEST_SECONDS", seconds)
    listening = socket.create_server(("127.0.0.1", 0))
    server = web.uvicorn.Server(web.settings(app))
    monkeypatch.setattr(server, "capture_signals", contextlib.nullcontext)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def answer_late(scope, receive, send):
    """Reads the request, and answers after the deadline of the next one."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(0.5)
    headers = [(b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"done"})


HEAD = b"POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"POST /mcp HTTP/1.1\r\nHost: x\r\n",
        HEAD,
        HEAD + b"abc",
        b"\r\n",
        HEAD + b"abcdG",
    ],
    ids=["nothing", "a byte", "half a head", "no body", "half a body", "an empty line", "the next"],
)
def test_a_request_that_does_not_end_is_closed(monkeypatch, sent):
    """C7: with or without a token. Slow bytes do not put the end off."""

    async def scene():
        async with impatient(monkeypatch, answer_late, 0.3) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), PATIENCE)  # returns when it is closed
            writer.close()

    asyncio.run(scene())


def test_a_slow_answer_and_the_requests_after_it_are_not_cut(monkeypatch):
    """C7."""

    async def scene():
        async with impatient(monkeypatch, answer_late, 0.3) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):  # over one connection
                writer.write(HEAD + b"abcd")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
                assert b"200 OK" in head
                await reader.readuntil(b"done")
            writer.close()

    asyncio.run(scene())
