"""The tools that ask another model, and that end the episode.

    pytest tests/test_tool_ask.py

The other model is a fake on 127.0.0.1.
"""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from images import Picture, open_image
from run.config import UserError
from run.loop import run_blocking
from tools import NetworkError, Toolbox, ToolError
from tools.ask import ask
from tools.finish import finish


@pytest.fixture
def model():
    """answer(request body) -> (status, body); then .requests: (path, headers, body)."""

    class Model:
        requests, url = [], ""

        @staticmethod
        def answer(body):
            return says("4")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Says nothing."""

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            made.requests.append((self.path, dict(self.headers), body))
            status, said = made.answer(body)
            text = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    made = Model()
    made.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield made
    server.shutdown()
    server.server_close()


def says(text, finish="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {"choices": [choice]}


def call(tool, question="2 and 2?"):
    return run_blocking(tool([], question))


def test_a_question_goes_out_with_system_prompt_key_and_limits(model, monkeypatch):
    monkeypatch.setenv("MY_KEY", "my-secret\r\n")  # as a file with CRLF gives it
    tool = ask(model.url + "/", "big", "MY_KEY", "Be short.", max_tokens=9, temperature=0.5)
    assert call(tool) == "4"
    assert call(tool, "\ud800") == "4"
    path, headers, body = model.requests[0]
    sent = {name.lower(): value for name, value in headers.items()}
    assert path == "/v1/chat/completions" and sent["authorization"] == "Bearer my-secret"
    assert body == {
        "model": "big",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "2 and 2?"},
        ],
        "temperature": 0.5,
        "max_tokens": 9,
    }


def test_a_key_that_cannot_be_sent_is_not_told_to_the_model(model, monkeypatch):
    """Nor written to rollouts.jsonl."""
    for key in ("my-\nsecret", "my-secret-schlüssel"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(ToolError, match="cannot be asked with the key as it is") as caught:
            call(ask(model.url, "big", "MY_KEY"))
        assert "secret" not in str(caught.value) and not model.requests


def test_a_missing_key_stops_the_run_at_the_start_but_not_on_this_machine(model, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="export OPENAI_API_KEY=..., or give ask.key_env="):
        ask("https://api.example.com/v1", "big")
    ask("https://api.example.com/v1", "big", key_env="")
    assert call(ask(model.url, "big")) == "4"
    assert "authorization" not in {name.lower() for name in model.requests[0][1]}
    for local in ("http://localhost:1/v1", "http://[::1]:1/v1", "http://127.0.0.2/v1"):
        ask(local, "big")
    with pytest.raises(UserError, match="ask.url = .localhost:8000.: expected http"):
        ask("localhost:8000", "big")
    with pytest.raises(UserError, match="ask.max_tokens = 0"):
        ask(model.url, "big", max_tokens=0)
    with pytest.raises(UserError, match="ask.*url"):
        Toolbox([ask], options=("ask.model=big",))


def test_an_endpoint_that_wants_another_name_for_the_limit_gets_it(model):
    def answer(body):
        if "max_tokens" in body:
            return 400, {"error": "use 'max_completion_tokens' instead of 'max_tokens'"}
        return says(f"{body['max_completion_tokens']}")

    model.answer = answer
    tool = ask(model.url, "new", max_tokens=77)
    assert call(tool) == "77" and call(tool) == "77" and len(model.requests) == 3


@pytest.mark.parametrize(
    "answer, kind, text",
    [
        ((500, b"oh"), NetworkError, "error: the other model is busy (HTTP 500: oh)"),
        ((429, {}), NetworkError, "error: the other model is busy (HTTP 429: {})"),
        ((401, b"no"), ToolError, "error: the other model refuses the key (HTTP 401: no)"),
        ((404, b"no"), ToolError, "error: the other model refuses the request (HTTP 404: no)"),
        ((200, b"<p>"), ToolError, "error: the answer of the other model makes no sense: <p>"),
        ((200, {"choices": []}), ToolError, None),
        ((200, [1]), ToolError, None),
    ],
)
def test_what_the_endpoint_does_wrong_is_an_observation(model, answer, kind, text):
    model.answer = lambda body: answer
    with pytest.raises(ToolError) as caught:
        call(ask(model.url, "big"))
    assert type(caught.value) is kind and caught.value.kind == "network"
    assert caught.value.text == text if text else "makes no sense" in caught.value.text


def test_an_answer_that_is_cut_or_empty_says_so(model):
    model.answer = lambda body: says("It is", "length")
    assert call(ask(model.url, "big", max_tokens=2)) == "It is\n[... cut at 2 tokens ...]"
    model.answer = lambda body: says(None)
    assert call(ask(model.url, "big")) == "(the other model said nothing)"


def test_questions_are_asked_at_the_same_time_and_a_busy_endpoint_again(model):
    """Pitfalls 38 and 41."""
    seen = []
    first_four = threading.Barrier(4)  # who is alone waits for ever

    def answer(body):
        question = body["messages"][0]["content"]
        seen.append(question)
        if seen.count("q3") == 1 and question == "q3":
            return 503, b"busy"
        first_four.wait(60)
        return says(question.upper())

    model.answer = answer
    box = Toolbox([ask], options=(f"ask.url={model.url}", "ask.model=big", "ask.timeout=60"))

    async def calls():
        session = box.open({})
        asked = (session.call("ask", {"question": f"q{i}"}) for i in range(8))
        found = await asyncio.gather(*asked)
        await box.close()
        return found

    found = run_blocking(calls())
    assert [(text, error) for text, error, _ in found] == [(f"Q{i}", None) for i in range(8)]
    assert len(seen) == 9


# With images


def pictures():
    return [Picture(Image.new("RGB", (30 * n, 20), (n, 0, 0)), key=n) for n in (1, 2)]


def asked_with_images(model, arguments, *options):
    options = (f"ask.url={model.url}", "ask.model=big", "ask.images=true", *options)
    box = Toolbox([ask], options=options)

    async def scene(images):
        found = await box.open({}, images).call("ask", arguments)
        await box.close()
        return found[:2]

    return box, scene


def test_a_question_carries_the_images_that_it_names(model):
    """The originals, as OpenAI's parts; True is no number."""
    box, scene = asked_with_images(model, {"question": "Which is wider?", "images": [2, 1]})
    properties = box.schemas[0]["function"]["parameters"]["properties"]
    assert list(properties) == ["question", "images"]
    shown = pictures()
    shown[0].shown = Image.new("RGB", (3, 2))
    assert run_blocking(scene(shown)) == ("4", None)
    ((_, _, body),) = model.requests
    parts = body["messages"][0]["content"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    assert texts == ["image 2:", "image 1:", "Which is wider?"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    opened = [open_image(url) for url in urls]
    assert [image.size for image in opened] == [(60, 20), (30, 20)]
    assert [image.getpixel((0, 0)) for image in opened] == [(2, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize(
    "numbers, kind, says",
    [
        ([3], "no_image", "error: there is no image 3; the images are 1 to 2"),
        ([0], "no_image", "error: there is no image 0; the images are 1 to 2"),
        ([1] * 9, "bad_image", "error: 9 images: expected at most 8 in a question"),
        (["1"], "bad_arguments", "error: "),
        (1, "bad_arguments", "error: "),
    ],
)
def test_numbers_that_are_none_are_observations(model, numbers, kind, says):
    _, scene = asked_with_images(model, {"question": "What?", "images": numbers})
    text, error = run_blocking(scene(pictures()))
    assert error == kind and text.startswith(says) and not model.requests


def test_a_model_that_sees_nothing_is_offered_no_images(model):
    """The schema of before; SFT, which shows it, needs no address."""
    plain = Toolbox([ask], options=(f"ask.url={model.url}", "ask.model=big")).schemas
    assert list(plain[0]["function"]["parameters"]["properties"]) == ["question"]
    assert Toolbox([ask], describe_only=True).schemas == plain
    shown = Toolbox([ask], options=("ask.images=true",), describe_only=True).schemas
    assert "images" in shown[0]["function"]["parameters"]["properties"]


def test_what_is_kept_is_kept_for_its_images(model):
    """Number 1 is another image in another trajectory."""
    box, _ = asked_with_images(model, {}, "ask.cache=true")

    async def scene():
        for images in (pictures()[:1], pictures()[1:], pictures()[:1]):
            await box.open({}, images).call("ask", {"question": "What?", "images": [1]})
        unknown = [Picture(Image.new("RGB", (9, 9)))]  # of a model elsewhere: not looked at
        for _ in range(2):
            await box.open({}, unknown).call("ask", {"question": "What?", "images": [1]})
        await box.close()

    run_blocking(scene())
    assert len(model.requests) == 4


def test_finish_ends_the_episode_with_its_answer():
    tool = Toolbox([finish]).tools["finish"]
    assert tool.ends and finish(answer="42") == "42"
    assert list(tool.schema["function"]["parameters"]["properties"]) == ["answer"]
