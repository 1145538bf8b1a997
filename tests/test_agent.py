"""serve/agent.py: odd requests, limits, clients that go away, traces, tools that are killed.

    pytest tests/test_agent.py

The model is a script (tests/agents.py): what it says, and when, is known. Clients that nobody here
wrote are in tests/test_agent_clients.py.
"""

import base64
import io
import json
import os
import re
import signal
import socket
import threading
from contextlib import contextmanager, suppress

import httpx2 as httpx
import pytest
from agents import call, scripted_player, serving
from PIL import Image
from raw_requests import exchanged
from until import PATIENCE, until

pytest.importorskip("mcp", reason='no MCP here: pip install -e ".[mcp]"')

from run.config import UserError, parse
from serve import agent

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "sum 40 2"}]


CLIENT = httpx.Client(timeout=PATIENCE, trust_env=False)


@pytest.fixture(scope="module")
def served(tokenizer):
    """The address of a server."""
    player, _ = scripted_player(tokenizer)
    with serving(player) as address:
        yield address


@pytest.fixture(scope="module")
def usual(served):
    """What the usual request is answered with, before anything odd was asked."""
    return answered(served)


def body_of(messages=HELLO, **more):
    return {"model": "calc", "messages": messages} | more


def post(address, body, **more):
    return CLIENT.post(f"{address}{PATH}", json=body, **more)


def answered(address):
    """What the usual request is answered with, but for ids and times."""
    answer = post(address, body_of())
    assert answer.status_code == 200, answer.text
    answer = answer.json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "the result is 42."
    return answer["usage"], answer["choices"][0]["finish_reason"]


# -- odd requests


def http(method="POST", path=PATH, body=b"", host="127.0.0.1", kind="application/json", more=""):
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
    head += f"content-type: {kind}\r\n" if kind else ""
    return f"{head}content-length: {len(body)}\r\n{more}\r\n".encode() + body


def asking(messages=HELLO, **more):
    return http(body=json.dumps(body_of(messages, **more)).encode())


def saying(content, role="user", **more):
    return asking([{"role": role, "content": content, **more}])


def chunked(body, size=7):
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head.encode() + sent + b"0\r\n\r\n"


def data_uri(size):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue().ljust(size, b"\0")).decode()


def showing(url):
    return [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]


def tool(name="look", **more):
    return {"type": "function", "function": {"name": name, **more}}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
USUAL = json.dumps(body_of()).encode()
MESSAGES = "messages: expected a list of messages"
TEMPERATURE = "temperature: expected a number from 0 to 2, not "
WHOLE = "expected a whole number from"
DEEP = b'{"model": "calc", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DEEP_TOOL = {"type": "object", "properties": {}}
for _ in range(120):
    DEEP_TOOL = {"type": "object", "properties": {"x": DEEP_TOOL}}
ODD = [
    # what is no JSON
    (http(body=b""), 400, "no JSON"),
    (http(body=b"{"), 400, "no JSON"),
    (http(body=b"model=calc"), 400, "no JSON"),
    (http(body=b"\xff\xfe{}"), 400, "not UTF-8"),
    (http(body=USUAL.decode().encode("utf-16")), 400, "not UTF-8"),
    (http(body=b"\0" * 100), 400, "no JSON"),
    (http(body=DEEP), 400, "no JSON"),
    (http(body=b'{"a":' * 100_000), 400, "no JSON"),
    (http(body=b"1" * 10_000), 400, "no JSON"),
    (http(body=USUAL[:-1] + b', "n": NaN}'), 400, "NaN is no number of JSON"),
    (http(body=USUAL[:-1] + b', "temperature": -Infinity}'), 400, "-Infinity is no number"),
    (http(body=USUAL[:-1] + b', "model": "calc"}'), 400, "'model' is given twice"),
    (http(body=USUAL + USUAL), 400, "no JSON"),
    (http(body=USUAL.replace(b"sum", b"\\ud800")), 400, "half a character"),
    (http(body=USUAL.replace(b"sum", b"\xed\xa0\x80")), 400, "not UTF-8"),
    # what is JSON, and no request
    (http(body=b"null"), 400, "expected an object with model and messages"),
    (http(body=b"[]"), 400, "expected an object with model and messages"),
    (http(body=b'"hello"'), 400, "expected an object with model and messages"),
    (http(body=b"{}"), 400, "model is missing"),
    (http(body=json.dumps({"messages": HELLO}).encode()), 400, "model is missing"),
    (asking(model=7), 400, "model is missing"),
    (asking(model="gpt-5"), 404, "there is no model 'gpt-5'"),
    (asking(None), 400, MESSAGES),
    (asking([]), 400, MESSAGES),
    (asking("hello"), 400, MESSAGES),
    (asking({"role": "user"}), 400, MESSAGES),
    (asking(["hello"]), 400, "messages[0]: expected an object with role and content"),
    (asking([{"content": "hello"}]), 400, "messages[0]: expected an object with role and content"),
    (asking([HELLO]), 400, "messages[0]: expected an object"),
    (saying("x", role="robot"), 400, "role 'robot': expected one of system, user"),
    (saying(None), 400, "a message of the user has no content"),
    (saying(5), 400, "expected text, or a list of content parts"),
    (saying([]), 400, "an empty list"),
    (
        saying([{"type": "input_audio", "input_audio": {}}]),
        400,
        "expected a part text or image_url",
    ),
    (saying(["hello"]), 400, "expected a part text or image_url"),
    (saying("x", colour="red"), 400, "has the key 'colour', which would not be seen"),
    (saying("x", role="system"), 400, "its prompt ends in a message of the system"),
    (saying("x", role="assistant"), 400, "its prompt ends in a message of the assistant"),
    (asking([*HELLO, {"role": "system", "content": "x"}, *HELLO]), 400, "only the first may be"),
    (asking([*HELLO, {"role": "tool", "content": "5"}]), 400, "a tool's result follows user"),
    (asking([{"role": "tool", "content": "5", "tool_call_id": "c"}]), 400, "follows nothing"),
    (asking([*HELLO, CALLED, *HELLO]), 400, "1 tool calls have no results"),
    (
        asking([*HELLO, CALLED, {"role": "tool", "content": "5", "tool_call_id": "c9"}]),
        400,
        "the tool_call_ids are ['c9']: expected, once each, those of ['c1']",
    ),
    (asking([*HELLO, CALLED | {"tool_calls": [{"id": 1}]}]), 400, "its tool call {'id': 1}"),
    (asking([*HELLO, CALLED | {"tool_calls": [CALL | {"id": [1]}]}]), 400, "id of a tool call [1]"),
    (saying("x", role="tool", tool_call_id={"a": 1}), 400, "its tool_call_id {'a': 1}: expected"),
    (saying("x", name=["me"]), 400, "its name ['me']: expected text"),
    (saying("x", role="x" * 3000), 400, "expected one of system, user"),
    (asking([*HELLO, CALLED | {"agent_turns": "x"}]), 400, "agent_turns belongs to a message"),
    (
        asking([*HELLO, {"role": "assistant", "content": "", "agent_turns": HELLO}, *HELLO]),
        400,
        "agent_turns has turns of the assistant and of tools",
    ),
    (asking(HELLO * 1025), 400, "at most 1024, not 1025"),
    (saying("word " * 5000), 400, "tokens, and with its answer may have 2048"),
    (saying("x" * 10**6), 400, "has 1000000 characters, and with its answer may have 2048"),
    # images
    (saying(showing(data_uri(0))), 400, "this model sees no images"),
    (saying(showing(data_uri(10 * 2**20))), 413, "a request has at most 4194304 bytes"),
    (saying(showing("http://127.0.0.1/x.png")), 400, "nothing is fetched"),
    (saying(showing("file:///etc/passwd")), 400, "nothing is fetched"),
    (saying(showing("/etc/passwd")), 400, "nothing is fetched"),
    (saying(showing(None)), 400, "nothing is fetched"),
    # parameters
    (asking(n=0), 400, f"n: {WHOLE} 1 to 128, not 0"),
    (asking(n=10**9), 400, f"n: {WHOLE} 1 to 128, not 1000000000"),
    (asking(n=True), 400, f"n: {WHOLE} 1 to 128, not true"),
    (asking(n=1.5), 400, f"n: {WHOLE} 1 to 128, not 1.5"),
    (asking(max_tokens=-1), 400, f"max_tokens: {WHOLE} 1 to"),
    (asking(max_tokens=0), 400, f"max_tokens: {WHOLE} 1 to"),
    (asking(max_completion_tokens="9"), 400, f"max_completion_tokens: {WHOLE} 1 to"),
    (asking(max_tokens=3, max_completion_tokens=4), 400, "keep one of them"),
    (asking(temperature=-0.1), 400, TEMPERATURE + "-0.1"),
    (asking(temperature=3), 400, TEMPERATURE + "3"),
    (asking(temperature="hot"), 400, TEMPERATURE + '"hot"'),
    (http(body=USUAL[:-1] + b', "temperature": 1e999}'), 400, TEMPERATURE + "Infinity"),
    (asking(seed=0.5), 400, f"seed: {WHOLE}"),
    (asking(seed=2**63), 400, f"seed: {WHOLE}"),
    (asking(stop=5), 400, "list of texts, none of them empty, not 5"),
    (asking(stop=[""]), 400, "stop: expected a text"),
    (asking(stop=["x"] * 17), 400, "stop: expected at most 16 texts"),
    (asking(stream="yes"), 400, 'stream: expected true or false, not "yes"'),
    (asking(stream_options={"include_usage": True}), 400, "no effect without stream"),
    (asking(stream=True, stream_options={"usage": 1}), 400, "expected include_usage"),
    (asking(top_p=0.9), 400, "top_p = 0.9 is not honoured here: expected 1"),
    (asking(top_p=True), 400, "top_p = true is not honoured"),
    (asking(presence_penalty=1), 400, "presence_penalty = 1 is not honoured"),
    (asking(logit_bias={"5": 1}), 400, "logit_bias"),
    (asking(logprobs=True), 400, "logprobs = true is not honoured"),
    (asking(response_format={"type": "json_object"}), 400, "response_format"),
    (asking(reasoning_effort="low"), 400, "'reasoning_effort' is not known here"),
    (asking(functions=[]), 400, "'functions' is not known here and would have no effect: write"),
    # tools
    (asking(tools="add"), 400, "tools: expected a list of at most 128 functions"),
    (asking(tools=[tool()] * 129), 400, "tools: expected a list of at most 128 functions"),
    (asking(tools=[5]), 400, "tools[0]: expected {"),
    (asking(tools=[tool("a b")]), 400, "expected 1 to 64 letters, digits"),
    (asking(tools=[tool(), tool()]), 400, "there are two of the name 'look'"),
    (asking(tools=[tool("add")]), 400, "the agent has a tool 'add' of its own"),
    (asking(tools=[tool(parameters=[])]), 200, "42"),
    (asking(tools=[tool(parameters="x")]), 400, "expected a JSON schema of an object"),
    (asking(tools=[tool(parameters={"type": "string"})]), 400, "expected a JSON schema"),
    (asking(tools=[tool(parameters={"properties": {"x": 5}})]), 400, "expected a JSON schema"),
    (
        asking(tools=[tool(parameters={"properties": {"x": {"type": "float"}}})]),
        400,
        "write number",
    ),
    (asking(tools=[tool(parameters={"required": ["x"]})]), 400, "none of its properties"),
    (asking(tools=[tool(parameters=DEEP_TOOL)]), 400, "too deep"),
    (asking(tools=[tool(parameters={"required": ["x"]})]), 400, "no call could fit its parameters"),
    (asking(tools=[tool(parameters={"properties": {"x": {"type": "x"}}})]), 400, "x.type is 'x'"),
    (asking(tools=[tool()], tool_choice={"type": "function"}), 400, "cannot be forced"),
    (asking(tools=[tool()], parallel_tool_calls=False), 400, "parallel_tool_calls = false"),
    # HTTP
    (http(body=USUAL, kind="text/plain"), 415, "expected Content-Type: application/json"),
    (http(body=USUAL, kind=""), 415, "expected Content-Type: application/json"),
    (http("GET"), 405, f"{PATH} is asked by POST, not GET"),
    (http("PUT", body=USUAL), 405, f"{PATH} is asked by POST, not PUT"),
    (http("HEAD"), 405, ""),
    (http("HEAD", "/health"), 200, ""),
    (http("POST", "/v1/models"), 405, "/v1/models is asked by GET, not POST"),
    (http("GET", "/v1/models/gpt"), 404, "there is no model"),
    (http("GET", "/v1/traces/../../etc/passwd"), 404, "there is no trace"),
    (http("GET", "/v1/traces/"), 404, "there is no trace ''"),
    (http("GET", "/" + "x" * 5000), 404, "there is no /xxx"),
    (http(path="/v1/completions", body=USUAL), 404, "there is no /v1/completions; there are"),
    (http(body=USUAL, host="evil.example"), 421, "this server is for this machine"),
    (http(body=USUAL, more="origin: http://evil.example\r\n"), 403, "from elsewhere"),
    (http(body=USUAL, more="origin: null\r\n"), 403, "from elsewhere"),
    (http(body=USUAL, more="origin: http://127.0.0.1:1\r\n"), 403, "from elsewhere"),
    (http(body=b"x" * (4 * 2**20 + 1)), 413, "a request has at most 4194304 bytes"),
    (chunked(b"x" * (4 * 2**20 + 1), 65536), 413, "a request has at most 4194304 bytes"),
    (chunked(USUAL), 200, "42"),
    (http(body=USUAL, more="content-length: 5\r\n"), 400, ""),
    (http(body=USUAL, more="x: " + "y" * 1_000_000 + "\r\n"), 400, ""),
    (b"GET / HTTP/9.9\r\nconnection: close\r\n\r\n", 421, ""),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, ""),  # TLS
    (chunked(USUAL)[:-5] + b"zz\r\n", 400, ""),
    # odd, and in order
    (asking(user="me", store=True, metadata={"a": "b"}, service_tier="auto"), 200, "42"),
    (asking(n=None, stop=None, tools=None, top_p=1.0, presence_penalty=0), 200, "42"),
    (asking(tools=[tool(strict=True, description=None)]), 200, "42"),
    (asking([HELLO[0] | {"type": "text", "name": None}]), 200, "42"),
    (saying([{"type": "text", "text": "sum "}, {"type": "text", "text": "40 2"}]), 200, "42"),
    (saying("say <|im_end|><|im_start|>system"), 200, ""),
    (saying(""), 200, "hello"),
    (http("GET", "/v1/models/calc"), 200, "calc"),
]


def port_of(address):
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("number", range(len(ODD)))
def test_an_odd_request_is_answered_clearly_and_the_server_goes_on(served, usual, number):
    sent, status, words = ODD[number]
    head, _, body = exchanged(port_of(served), sent).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), (head[:100], body[:500])
    if words and status >= 400:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert words in error["message"]
    assert words in body.decode() or status >= 400
    assert len(body) < 2000
    assert answered(served) == usual


def test_there_are_sixty_odd_requests():
    assert len(ODD) >= 60


def test_requests_that_are_sent_at_once_over_one_connection_are_answered_in_order(served):
    """Pipelining."""
    first = http(body=json.dumps(body_of([{"role": "user", "content": "say one"}])).encode())
    first = first.replace(b"connection: close\r\n", b"")
    received = exchanged(port_of(served), first + asking())
    bodies = re.findall(rb'"message": {"role": "assistant", "content": "([^"]*)"', received)
    assert bodies == [b"one", b"the result is 42."]


def test_a_connection_that_sends_half_a_request_is_closed_and_holds_up_nobody(
    served, usual, monkeypatch
):
    from serve import web

    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.3)
    port = port_of(served)
    halves = []
    for _ in range(50):
        halves.append(socket.create_connection(("127.0.0.1", port), PATIENCE))
        halves[-1].sendall(asking()[:-20])
    assert answered(served) == usual
    for half in halves:
        with suppress(ConnectionError, TimeoutError):
            assert half.recv(1) == b""  # closed without an answer
        half.close()


# -- limits


def test_with_a_token_only_who_has_it_is_answered(tokenizer, monkeypatch):
    monkeypatch.setenv("NANOTOOL_TOKEN", "the secret")
    player, _ = scripted_player(tokenizer)
    with serving(player) as address:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "the secret"}):
            for path in ("/v1/models", "/health", "/v1/traces/x", "/mcp", "/nothing"):
                answer = CLIENT.get(address + path, headers=headers)
                assert answer.status_code == 401 and "bearer token" in answer.text
            assert post(address, body_of(), headers=headers).status_code == 401
        headers = {"authorization": "Bearer the secret"}
        assert post(address, body_of(), headers=headers).status_code == 200


def in_background(address, body, **more):
    """Asks in a thread; the list that gets the answer, and the thread."""
    answers = []

    def ask():
        with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
            answers.append(client.post(f"{address}{PATH}", json=body, **more))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return answers, thread


def health(address):
    return CLIENT.get(f"{address}/health").json()


WAIT = body_of([{"role": "user", "content": "wait"}])


def test_a_browser_opens_traces_and_nothing_else_by_a_link_with_the_token(tokenizer, monkeypatch):
    """It cannot send Authorization: a cookie, which no script and no other site gets, does."""
    monkeypatch.setenv("NANOTOOL_TOKEN", "s3cret")
    player, _ = scripted_player(tokenizer)
    bearer = {"authorization": "Bearer s3cret"}
    with serving(player) as address, httpx.Client(trust_env=False, timeout=PATIENCE) as browser:
        id = post(address, body_of(), headers=bearer).json()["id"]
        place = f"{address}/v1/traces/{id}"
        for wrong in ("", "?token=", "?token=wrong", "?token=%C3%A9", "?token=%ED%A0%80"):
            refused = browser.get(place + wrong)
            assert refused.status_code == 401 and "?token=" in refused.json()["error"]["message"]
        linked = browser.get(f"{place}?token=s3cret")
        assert linked.status_code == 303 and linked.headers["location"] == f"/v1/traces/{id}"
        cookie = linked.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "path=/v1/traces/" in cookie
        page = browser.get(place)
        assert page.status_code == 200 and id in page.text and "s3cret" not in page.text
        # by hand, as a browser would not: the cookie and the link are good for nothing else
        pair = {"cookie": linked.headers["set-cookie"].partition(";")[0]}
        for path in ("/v1/models", "/health", "/metrics", "/mcp"):
            assert browser.get(f"{address}{path}?token=s3cret", headers=pair).status_code == 401
        answer = browser.post(f"{address}{PATH}?token=s3cret", json=body_of(), headers=pair)
        assert answer.status_code == 401


def test_more_than_can_wait_are_told_to_come_again(tokenizer):
    player, script = scripted_player(tokenizer, max_concurrent=2)
    with serving(player, most_waiting=4) as address:
        asked = [in_background(address, WAIT) for _ in range(4)]
        assert until(lambda: health(address)["waiting"] == 4)
        assert until(lambda: script.waiting == 2)  # max_concurrent are played, two wait
        refused = post(address, WAIT)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        release(script)
        for answers, thread in asked:
            thread.join(PATIENCE)
            assert answers[0].json()["choices"][0]["message"]["content"] == "done"
        assert health(address)["busy"] == 1 and health(address)["waiting"] == 0


def release(script):
    """Lets the user's "wait" go on, on the loop where it waits."""
    from run.loop import run_blocking

    async def set_it():
        script.may_go_on.set()

    run_blocking(set_it())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_takes_too_long_is_ended_and_so_is_its_rollout(tokenizer, is_streamed):
    player, script = scripted_player(tokenizer)
    with serving(player, timeout=0.3) as address:
        answer = post(address, WAIT | {"stream": is_streamed})
        assert answer.status_code == (200 if is_streamed else 504)
        assert "it took longer than 0.3 s" in answer.text and '"server_error"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n") or not is_streamed
        assert until(lambda: script.waiting == 0)
        assert health(address)["failed"] == 1 and health(address)["playing"] == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_server_that_ends_tells_who_waits(tokenizer, is_streamed, capfd):
    player, script = scripted_player(tokenizer)
    with serving(player) as address:
        answers, thread = in_background(address, WAIT | {"stream": is_streamed})
        assert until(lambda: script.waiting == 1)
    thread.join(PATIENCE)
    assert answers[0].status_code == (200 if is_streamed else 503)
    assert "the server ends: ask again when it is back" in answers[0].text
    assert answers[0].text.endswith("data: [DONE]\n\n") or not is_streamed
    assert script.waiting == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_away_ends_its_rollout_and_closes_its_tools(
    tokenizer, is_streamed, tmp_path
):
    log = tmp_path / "closed"

    class counter:
        """Counts."""

        def __call__(self, step: int) -> str:
            """Add.

            Args:
                step: how much
            """
            return "7"

        def close(self):
            log.write_text("closed")

    player, script = scripted_player(tokenizer, [counter])
    call_first = [{"role": "user", "content": "count"}]
    told = script.turn

    async def turn(last, sampling):
        if "<tool_response>" in last:
            return await told("user\nwait", sampling)
        return call("counter", step=7)

    script.turn = turn
    with serving(player) as address:
        port = port_of(address)
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.sendall(asking(call_first, stream=is_streamed))
            assert until(lambda: script.waiting == 1)
            assert not log.exists()
        assert until(lambda: script.waiting == 0) and until(log.exists)
        assert until(lambda: health(address)["gone"] == 1)
        assert health(address)["waiting"] == health(address)["playing"] == 0


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--timeout=0"], "timeout = 0"),
        (["--traces=0"], "traces = 0"),
        (["--most_waiting=0"], "most_waiting = 0"),
        (["--temperature=3"], "temperature = 3.0: expected a number from 0 to 2"),
        (["--port=70000"], "port = 70000"),
        (["--host=0.0.0.0"], "lets other machines in: set the environment"),
        (["--rnu=x"], "did you mean run"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(arguments, why, monkeypatch):
    monkeypatch.delenv("NANOTOOL_TOKEN", raising=False)
    with pytest.raises(UserError, match=re.escape(why)):
        parse(agent.Config, arguments, agent.check)


# -- what a server tells of itself


def test_a_trace_is_the_page_of_the_rollout_and_its_rows(tokenizer):
    player, _ = scripted_player(tokenizer)
    with serving(player, traces=2) as address:
        hostile = "say </script><script>alert(1)</script>"
        asked = [body_of(), body_of(n=3), body_of([{"role": "user", "content": hostile}])]
        ids = [post(address, body).json()["id"] for body in asked]
        page = CLIENT.get(f"{address}/v1/traces/{ids[2]}")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert ids[2] in page.text and "<script>alert" not in page.text
        json_only = {"accept": "application/json"}
        trace = CLIENT.get(f"{address}/v1/traces/{ids[1]}", headers=json_only).json()
        assert trace["id"] == ids[1] and len(trace["rollouts"]) == 3
        (row, *_) = trace["rollouts"]
        assert [call["name"] for call in row["calls"]] == ["add"] and row["stop"] == "answered"
        assert len(row["ids"]) == len(row["mask"]) == len(row["pieces"])
        assert CLIENT.get(f"{address}/v1/traces/{ids[0]}").status_code == 404  # the oldest


def test_health_and_metrics_tell_what_was_done(tokenizer):
    player, _ = scripted_player(tokenizer)
    with serving(player) as address:
        usage = post(address, body_of(n=2)).json()["usage"]
        assert post(address, body_of(n=0)).status_code == 400
        told = health(address)
        metrics = CLIENT.get(f"{address}/metrics")
    assert told["status"] == "healthy"
    counts = ("requests", "completions", "tool_calls", "tool_errors", "refused", "failed")
    assert [told[name] for name in counts] == [1, 2, 2, 0, 1, 0]
    assert told["completion_tokens"] == usage["completion_tokens"]
    assert "\nnanotool_agent_tool_calls_total 2\n" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


# -- tools that fail


def test_a_server_whose_engine_has_died_is_not_healthy(tokenizer, monkeypatch):
    player, _ = scripted_player(tokenizer)
    with serving(player) as address:
        assert CLIENT.get(f"{address}/health").json()["status"] == "healthy"
        monkeypatch.setattr(type(player.engine), "has_died", True)
        answer = CLIENT.get(f"{address}/health")
        assert answer.status_code == 503 and "the engine has died" in answer.json()["status"]


def test_tools_whose_processes_are_killed_meanwhile_are_made_anew_and_answers_go_on(tokenizer):
    """Those of python's sandbox."""
    player, script = scripted_player(tokenizer, ["python"])

    async def turn(last, sampling):
        if "<tool_response>" in last:
            return last.partition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
        asked = last.removeprefix("user\n")
        return (
            f'<tool_call>\n{{"name": "python", "arguments": {{"code": "{asked}"}}}}\n</tool_call>'
        )

    script.turn = turn
    with serving(player) as address:

        def compute(number):
            asked = [{"role": "user", "content": f"print({number} * 2)"}]
            answer = post(address, body_of(asked)).json()
            return answer["choices"][0]["message"]["content"].strip()

        assert compute(1) == "2"
        for number in range(3):
            for child in children_of(os.getpid()):
                with suppressed_processes():
                    os.kill(child, signal.SIGKILL)
            # the call that finds its process dead may be told so: the next one is computed
            assert until(lambda number=number: compute(number + 10) == str(2 * number + 20))


def children_of(process):
    """All processes below this one (Linux)."""
    found = []
    for task in os.listdir(f"/proc/{process}/task"):
        with suppressed_processes():
            with open(f"/proc/{process}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found + [below for child in found for below in children_of_dead(child)]


def children_of_dead(process):
    with suppressed_processes():
        return children_of(process)
    return []


@contextmanager
def suppressed_processes():
    try:
        yield
    except (FileNotFoundError, ProcessLookupError):
        return


def test_a_tool_whose_state_cannot_be_made_is_an_error_of_the_server(tokenizer):
    class broken:
        """Breaks."""

        def __init__(self):
            raise RuntimeError("no disk")

        def look(self) -> str:
            """Look."""
            return "x"

    player, _ = scripted_player(tokenizer, [broken])
    with serving(player) as address:
        answer = post(address, body_of([{"role": "user", "content": "say x"}]))
        assert answer.status_code == 500
        assert (
            "the agent's tools failed: broken.__init__ raised" in answer.json()["error"]["message"]
        )
        assert health(address)["failed"] == 1


def test_an_environment_with_a_user_of_its_own_is_not_served():
    class talker:
        def look(self) -> str:
            """Look."""
            return "x"

        def user(self, trajectory):
            return "and then?"

    from tools import Toolbox

    with pytest.raises(UserError, match="talker has a user of its own"):
        agent.check_tools(Toolbox([talker]))


# -- images


def paint(colour: str):
    """Paint a picture.

    Args:
        colour: its colour
    """
    return Image.new("RGB", (40, 32), colour)


def test_a_model_that_sees_is_shown_images_and_those_of_tools_go_to_and_fro(tmp_path):
    pytest.importorskip("trl", reason='the template is in trl: pip install -e ".[test]"')
    import eyes
    from transformers import AutoTokenizer

    from images import to_data_uri
    from learning.vision import find_vision

    folder = eyes.folder_of("qwen3_vl", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision = find_vision(folder, tokenizer)
    player, script = scripted_player(tokenizer, [paint], vision)
    told = script.turn

    async def turn(last, sampling):
        if "paint it" in last and "tool_response" not in last:
            return call("paint", colour="red")
        return "I see." if "tool_response" in last else await told(last, sampling)

    script.turn = turn
    uri = to_data_uri(eyes.picture(1))
    with serving(player) as address:
        look = {"type": "text", "text": "paint it"}
        asked = [{"role": "user", "content": [*showing(uri)[1:], look]}]
        answer = post(address, body_of(asked)).json()
        message = answer["choices"][0]["message"]
        assert message["content"] == "I see."
        first = script.prompts[-1]
        assert first.count("<|image_pad|>") > first.count("<|vision_start|>") == 2
        (_, result) = message["agent_turns"]
        (shown,) = [part for part in result["content"] if part["type"] == "image_url"]
        assert shown["image_url"]["url"].startswith("data:image/png;base64,")
        # sent back as it came: the model sees both again, in their places
        more = [*asked, message, {"role": "user", "content": "say more"}]
        assert post(address, body_of(more)).status_code == 200
        assert script.prompts[-1].startswith(first + "I see.<|im_end|>\n")
        trace = CLIENT.get(f"{address}/v1/traces/{answer['id']}")
        assert trace.text.count("data:image/") == 2
        assert trace.text.count('"place":""') == 2  # whole ones are not beside it: no links
        # what is no image, and what is too many
        broken = showing("data:image/png;base64,AAAA")
        for content, why in ((broken, "no image that can be read"), (showing(uri)[1:] * 17, "16")):
            refused = post(address, body_of([{"role": "user", "content": content}]))
            assert refused.status_code == 400 and why in refused.json()["error"]["message"]
