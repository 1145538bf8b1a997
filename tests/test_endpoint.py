"""Evaluation behind an OpenAI-compatible chat endpoint: native calls, limits, retries, refusals.

    pytest tests/test_endpoint.py

The endpoint here is a fake on 127.0.0.1; tests/test_vllm.py asks a real one.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

import data
import evaluate
import rewards
from engines import chat_api
from engines.base import Sampling
from engines.chat_api import ChatApi, Endpoint
from evaluate import play_api_turn
from formats.messages import count_images
from images import open_image
from rollout import Settings, rollouts
from run import http
from run import log as run_log
from run.config import UserError
from run.http import TEMPORARY, key_from
from run.loop import run_blocking
from tools import NetworkError, Toolbox
from tools.ask import ask


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: another
    """
    return a + b


def say(text="", *calls, finish="stop", tokens=7, total=50):
    """A whole answer. calls: (name, arguments as JSON)."""
    message = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = [
            {"id": f"call-{i}", "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ]
    usage = {"completion_tokens": tokens, "total_tokens": total}
    return 200, {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


@pytest.fixture
def api():
    """script(list of (code, body) or a function of the request); then .requests and .url."""

    class Api:
        requests, script, headers, clients = [], [], [], []
        headers_of_answers = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            """Says nothing."""

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            made.requests.append(asked)
            made.headers.append(dict(self.headers))
            made.clients.append(self.client_address)
            said = made.script(asked) if callable(made.script) else made.script.pop(0)
            text = said[1] if isinstance(said[1], bytes) else json.dumps(said[1]).encode()
            self.send_response(said[0])
            self.send_header("content-type", "application/json")
            for name, value in made.headers_of_answers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    made = Api()
    made.requests, made.headers, made.clients = [], [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield made
    server.shutdown()
    server.server_close()


EXAMPLE = {"messages": [{"role": "user", "content": "2 and 3?"}], "answer": "5", "id": 0}


def episode(api, script, samples=1, pause=0.01, key="", **settings):
    """The trajectories of one example."""
    api.script = script
    box = Toolbox([add])
    asked = Endpoint(api.url, "gpt", box.schemas, key, pause)
    try:
        how = Settings(**settings)
        selected = rewards.select(("correct",))
        played = rollouts(
            [EXAMPLE], asked, asked, box, how, 0, samples, selected, turn=play_api_turn
        )
        return run_blocking(played)
    finally:
        run_blocking(asked.close())


def test_native_calls_are_run_and_their_results_go_back_under_their_ids(api):
    calls = ("add", '{"a": 2, "b": 3}'), ("add", '{"a": 1, "b": 1}')
    (t,) = episode(api, [say("", *calls), say("The answer is \\boxed{5}.")])
    assert t.stop == "answered" and t.reward == 1.0 and t.new_tokens == 14 and t.ids == []
    assert [c.result for c in t.calls] == ["5", "2"] and [c.turn for c in t.calls] == [0, 0]
    told = api.requests[1]["messages"][2:]
    assert [(m["tool_call_id"], m["content"]) for m in told] == [("call-0", "5"), ("call-1", "2")]
    assert api.requests[0]["tools"][0]["function"]["name"] == "add"
    assert api.requests[0]["seed"] != api.requests[1]["seed"]


def test_calls_that_are_wrong_are_told_so_and_counted(api):
    """Pitfall 9: not JSON, no object, no such tool, wrong arguments."""
    wrong = ("add", "{a: 2"), ("add", "[1]"), ("sub", "{}"), ("add", '{"a": 2}')
    (t,) = episode(api, [say("", *wrong), say("never mind")])
    errors = [c.error for c in t.calls]
    assert errors == ["bad_json", "bad_json", "unknown_tool", "bad_arguments"]
    assert t.stop == "answered" and all(c.result for c in t.calls)


@pytest.mark.parametrize(
    "script, settings, stop",
    [
        ([say("", ("add", '{"a": 1, "b": 1}'), finish="length")], {}, "length"),
        ([say("", ("add", '{"a": 1, "b": 1}'))] * 3, {"max_turns": 2}, "max_turns"),
        ([say("", ("add", '{"a": 1, "b": 1}'))] * 3, {"max_tool_calls": 1}, "max_tool_calls"),
        ([say("", ("add", '{"a": 1, "b": 1}'), total=900)], {"max_tokens": 800}, "length"),
        ([(400, {"message": "maximum context length is 100"})], {}, "length"),
        ([(400, {"e": "context_length_exceeded: lower max_completion_tokens"})], {}, "length"),
    ],
)
def test_limits_are_those_of_a_rollout(api, script, settings, stop):
    (t,) = episode(api, list(script), **settings)
    assert t.stop == stop


def test_the_last_turn_has_no_tools(api):
    script = [say("", ("add", '{"a": 2, "b": 3}')), say("\\boxed{5}")]
    (t,) = episode(api, script, max_turns=1, final_turn=True)
    assert t.stop == "answered" and t.reward == 1.0
    assert "tools" in api.requests[0] and "tools" not in api.requests[1]


def test_a_busy_endpoint_is_asked_again_and_what_it_never_says_ends_the_evaluation(api):
    """Not a trajectory that is counted as wrong: the number would say less of the model."""
    (t,) = episode(api, [(429, {}), (503, {}), say("\\boxed{5}")])
    assert t.reward == 1.0 and len(api.requests) == 3
    with pytest.raises(UserError, match="not answered in 6 attempts: HTTP 500"):
        episode(api, lambda asked: (500, {"error": "down"}))


def test_an_answer_without_a_message_is_asked_for_again(api):
    """As some endpoints send when they are busy: with status 200."""
    odd = [(200, {"error": "busy"}), (200, {"choices": []}), (200, ["?"])]
    (t,) = episode(api, [*odd, say("\\boxed{5}")])
    assert t.reward == 1.0 and len(api.requests) == 4
    bare = {"choices": [{"message": {"role": "assistant", "content": "\\boxed{5}"}}]}
    bare["usage"] = {"completion_tokens": None}
    (t,) = episode(api, [(200, bare)])
    assert (t.stop, t.reward, t.new_tokens) == ("answered", 1.0, 0)


def test_calls_without_an_id_or_too_deep_do_not_end_the_run(api):
    said = say("", ("add", '{"a": 2, "b": 3}'), ("add", "[" * 5000), ("add", '{"a":' * 900))
    for call in said[1]["choices"][0]["message"]["tool_calls"]:
        del call["id"]
    (t,) = episode(api, [said, say("\\boxed{5}")])
    assert [c.error for c in t.calls] == [None, "bad_json", "bad_json"] and t.reward == 1.0


def test_a_connection_is_kept_between_questions_and_closed_at_the_end(api):
    asked = Endpoint(api.url, "gpt", [])
    run_blocking(asked.close())  # before there is one
    for _ in range(3):
        api.script = [say("hello")]
        asking = asked.ask([{"role": "user", "content": "x"}], Sampling(), with_tools=False)
        assert run_blocking(asking).text == "hello"
    assert len(set(api.clients)) == 1
    run_blocking(asked.close())
    assert asked.api.http.connections.is_closed


def test_a_busy_endpoint_says_itself_how_long_it_wants_to_be_left_alone(api, monkeypatch):
    """One that says nonsense, or much too long, is not obeyed."""
    waits = []

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr(chat_api.asyncio, "sleep", note)
    for wanted in ("7", "2.5", "100000", "tomorrow"):
        api.headers_of_answers = {"retry-after": wanted}
        api.script = [(429, {}), say("hello")]
        asked = ChatApi(api.url, "gpt", pause=0.01)
        assert run_blocking(asked.ask([], 0.0, 9)).text == "hello"
        run_blocking(asked.close())
    assert waits[:3] == [7.0, 2.5, 60.0] and waits[3] < 0.02


@pytest.mark.parametrize("status", TEMPORARY)
def test_evaluation_the_judge_and_the_ask_tool_agree_on_what_is_worth_asking_again(api, status):
    """They ask through one client."""
    api.script = [(status, {}), say("hello")]
    asked = ChatApi(api.url, "gpt", pause=0.001)
    assert run_blocking(asked.ask([], 0.0, 9)).text == "hello"
    api.script = [(status, {})]
    with pytest.raises(NetworkError, match=f"is busy .HTTP {status}"):
        run_blocking(ask(api.url, "gpt")([], "2 and 2?"))
    run_blocking(asked.close())


def message(**keys):
    """An answer whose message has these keys."""
    usage = {"completion_tokens": 7, "total_tokens": 50}
    choice = {"message": {"role": "assistant", **keys}, "finish_reason": "stop"}
    return 200, {"choices": [choice], "usage": usage}


def with_call(call, **keys):
    return message(content=None, tool_calls=call if isinstance(call, list) else [call], **keys)


FUNCTION = {"name": "add", "arguments": '{"a": 2, "b": 3}'}
CALL = {"id": "x1", "type": "function", "function": FUNCTION}
RIGHT = message(content="\\boxed{5}")
DEEP = json.loads("[" * 200 + "]" * 200)
GOES_ON = ("answered", 1.0)
NOT_RIGHT = ("answered", 0.0)
ALONE = ("error", 0.0)
TOO_LONG = ("length", 0.0)
# What the API says once, how that row then ends, and what it is worth.
ODD = {
    "content in parts": (
        message(
            content=[{"type": "thinking", "thinking": []}, {"type": "text", "text": "\\boxed{5}"}]
        ),
        GOES_ON,
    ),
    "content in texts": (message(content=["\\boxed", "{5}"]), GOES_ON),
    "content a number": (message(content=5), NOT_RIGHT),
    "content an object": (message(content={"text": "\\boxed{5}"}), GOES_ON),
    "content true": (message(content=True), NOT_RIGHT),
    "content missing": (message(), NOT_RIGHT),
    "content with a surrogate": (message(content="\ud800 \\boxed{5}"), GOES_ON),
    "usage a text": ((200, RIGHT[1] | {"usage": "none"}), GOES_ON),
    "usage a list": ((200, RIGHT[1] | {"usage": [1]}), GOES_ON),
    "usage of texts": ((200, RIGHT[1] | {"usage": {"total_tokens": "9"}}), GOES_ON),
    "usage below 0": ((200, RIGHT[1] | {"usage": {"total_tokens": -9}}), GOES_ON),
    "usage infinite": ((200, RIGHT[1] | {"usage": {"total_tokens": float("inf")}}), GOES_ON),
    "finish a number": (
        (200, {"choices": [{"message": {"content": "\\boxed{5}"}, "finish_reason": 3}]}),
        GOES_ON,
    ),
    "calls null": (message(content="\\boxed{5}", tool_calls=None), GOES_ON),
    "calls a text": (message(content="\\boxed{5}", tool_calls="add"), GOES_ON),
    "calls an object": (message(content="\\boxed{5}", tool_calls=CALL), GOES_ON),
    "calls of null": (with_call([None, CALL]), GOES_ON),
    "a call a text": (with_call("add"), GOES_ON),
    "a call a number": (with_call(3), GOES_ON),
    "a call without function": (with_call({"id": "x1", "type": "function"}), GOES_ON),
    "a call of null": (with_call(CALL | {"function": None}), GOES_ON),
    "a call without name": (with_call(CALL | {"function": {"arguments": "{}"}}), GOES_ON),
    "a name null": (with_call(CALL | {"function": FUNCTION | {"name": None}}), GOES_ON),
    "a name a number": (with_call(CALL | {"function": FUNCTION | {"name": 7}}), GOES_ON),
    "a name a surrogate": (with_call(CALL | {"function": FUNCTION | {"name": "a\udfff"}}), GOES_ON),
    "a name too long": (with_call(CALL | {"function": FUNCTION | {"name": "é" * 999}}), GOES_ON),
    "a custom call": (
        with_call({"type": "custom", "custom": {"name": "add", "input": "2"}}),
        GOES_ON,
    ),
    "a call of old": (message(content=None, function_call=FUNCTION), GOES_ON),
    "ids alike": (with_call([CALL, CALL]), GOES_ON),
    "id null": (with_call(CALL | {"id": None}), GOES_ON),
    "id a number": (with_call(CALL | {"id": 12}), GOES_ON),
    "arguments an object": (
        with_call(CALL | {"function": FUNCTION | {"arguments": {"a": 2}}}),
        GOES_ON,
    ),
    "arguments a list": (with_call(CALL | {"function": FUNCTION | {"arguments": [2]}}), GOES_ON),
    "arguments null": (with_call(CALL | {"function": FUNCTION | {"arguments": None}}), GOES_ON),
    "arguments broken": (
        with_call(CALL | {"function": FUNCTION | {"arguments": "{a: 2"}}),
        GOES_ON,
    ),
    "arguments not a number": (
        with_call(CALL | {"function": FUNCTION | {"arguments": '{"a": NaN, "b": 1}'}}),
        GOES_ON,
    ),
    "arguments a surrogate": (
        with_call(CALL | {"function": FUNCTION | {"arguments": '{"a": "\ud800"}'}}),
        GOES_ON,
    ),
    "arguments too deep": (with_call(CALL | {"function": FUNCTION | {"arguments": DEEP}}), GOES_ON),
    "thoughts too deep": (with_call(CALL, reasoning_details=DEEP), GOES_ON),
    "a message a text": ((200, {"choices": [{"message": "hello"}]}), GOES_ON),
    "a choice null": ((200, {"choices": [None]}), GOES_ON),
    "choices a text": ((200, {"choices": "?"}), GOES_ON),
    "half of its JSON": ((200, b'{"choices": [{"mess'), GOES_ON),
    "JSON without end": ((200, b"[" * 50_000), GOES_ON),
    "a page": ((200, b"<html>busy</html>"), GOES_ON),
    "a number": ((200, 7), GOES_ON),
    "a message that failed": (
        (200, {"choices": [{"message": {"content": ""}, "finish_reason": "error"}]}),
        GOES_ON,
    ),
    "a message filtered": (
        (200, {"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}),
        ALONE,
    ),
    "a conversation filtered": ((400, {"error": {"code": "content_filter"}}), ALONE),
    "a conversation moderated": ((403, {"error": "flagged by moderation"}), ALONE),
    "a call that it could not read": ((400, {"error": "Failed to call a function"}), ALONE),
    "a body that it does not like": ((422, {"detail": [{"loc": ["messages"]}]}), ALONE),
    "nothing": ((204, b""), ALONE),
    "too long: llama.cpp": (
        (
            400,
            {"error": "the request exceeds the available context size (99 tokens)"},
        ),
        TOO_LONG,
    ),
    "too long: Anthropic": (
        (400, {"error": "prompt is too long: 215000 tokens > 200000 maximum"}),
        TOO_LONG,
    ),
    "too long: Gemini": (
        (
            400,
            {"error": "The input token count (12000) exceeds the maximum number (9000)."},
        ),
        TOO_LONG,
    ),
    "too long: TGI": (
        (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 8192. Given: 9000 and 512"}),
        TOO_LONG,
    ),
    "too long: Mistral": (
        (
            400,
            {"error": "Prompt contains 40000 tokens, too large for model with 32768 maximum"},
        ),
        TOO_LONG,
    ),
    "too long: SGLang": (
        (
            400,
            {"error": "The input (50000 tokens) is longer than the model's context."},
        ),
        TOO_LONG,
    ),
}


def strict(asked):
    """RIGHT, or what an API says that checks a conversation as most do."""
    ids = []
    for sent in asked["messages"]:
        for call in sent.get("tool_calls", []):
            ids.append(call["id"])
            assert call["type"] == "function" and len(call["id"]) > 1
            assert re.fullmatch("[A-Za-z0-9_-]{1,64}", call["function"]["name"])
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        if sent["role"] == "tool":
            assert sent["tool_call_id"] == ids.pop(0)
        assert isinstance(sent["content"], str) and "\ud800" not in json.dumps(sent)
    return RIGHT


@pytest.mark.parametrize("way", ODD)
def test_however_odd_an_api_is_it_is_one_rows_matter(api, tmp_path, way):
    """B1: that row goes on or ends alone and is counted; the others are as if nothing had been."""
    answer, (stop, worth) = ODD[way]
    is_said = []

    def script(asked):
        is_odd = "odd" in asked["messages"][0]["content"]
        may_come_again = answer[0] != 200 or "filtered" in way
        if is_odd and (may_come_again or not is_said):
            is_said.append(way)
            return answer
        try:
            return strict(asked)
        except (AssertionError, KeyError, IndexError, ValueError) as error:
            return 400, {"error": f"a bad conversation: {type(error).__name__} {error}"}

    rows = [f"{EXAMPLE['messages'][0]['content']} {name}" for name in ("one", "odd", "two")]
    examples = [
        {"messages": [{"role": "user", "content": text}], "answer": "5", "id": 0} for text in rows
    ]
    played, asked = play(api, script, examples)
    ends = [(t.stop, t.reward) for t in played]
    assert ends == [GOES_ON, (stop, worth), GOES_ON], asked.refused
    assert len(asked.refused) == (stop == "error") == ("refused" in asked.report())
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", played, None)
    assert played[1].unseen_tokens >= 0


def play(api, script, examples, **settings):
    """(trajectories, the Endpoint) of these rows."""
    api.script = script
    box = Toolbox([add])
    asked = Endpoint(api.url, "gpt", box.schemas, pause=0.001)
    try:
        selected = rewards.select(("correct",))
        how = Settings(**settings)
        playing = rollouts(examples, asked, asked, box, how, 0, 1, selected, turn=play_api_turn)
        return run_blocking(playing), asked
    finally:
        run_blocking(asked.close())


EVERYTHING = [
    (200, {"error": "no such thing"}),
    (200, b"<html>"),
    (400, {"error": "this model does not support tools"}),
    (400, {"error": "the model `gpt` does not exist"}),
    (402, {"error": "no credit"}),
    (403, {"error": "not in your region"}),
    (404, b""),
    (410, b"gone"),
    (301, b""),
    (204, b""),
    (500, b"\xff\xfe"),
]


@pytest.mark.parametrize("answer", EVERYTHING)
def test_what_an_api_says_to_everybody_ends_the_evaluation_in_one_sentence(api, answer):
    """B1."""
    with pytest.raises(UserError, match="^http://127.0.0.1:.* (refuses|wants|has not answered)"):
        play(api, lambda asked: answer, [EXAMPLE] * 2)


@pytest.mark.parametrize(
    "refusal",
    [
        "Unsupported value: 'temperature' does not support 0 with this model. Only 1 is supported.",
        "Unsupported parameter: seed",
        "seed and temperature are not permitted",
        "Unsupported parameter: 'max_tokens' is not supported with this model.",
        "messages.1.reasoning_content: Extra inputs are not permitted",
    ],
)
def test_a_parameter_that_is_refused_by_name_is_dropped_and_said(api, capsys, refusal):
    """B1: and the request repeated; later ones are without it from the start."""
    names = [n for n in ("temperature", "seed", "max_tokens", "reasoning_content") if n in refusal]

    def script(asked):
        text = json.dumps(asked)
        if any(f'"{name}"' in text for name in names):
            return 400, {"error": refusal}
        if len(asked["messages"]) < 3:
            return with_call(CALL, reasoning_content="hm")
        return RIGHT

    played, asked = play(api, script, [EXAMPLE] * 3, max_concurrent=1)
    assert [(t.stop, t.reward) for t in played] == [GOES_ON] * 3 and not asked.refused
    late = [json.dumps(request) for request in api.requests[-2:]]
    assert not any(f'"{name}"' in text for name in names for text in late)
    dropped = [name for name in names if name != "max_tokens"]
    assert sorted(asked.api.not_taken) == sorted(dropped)
    told = capsys.readouterr().err
    assert all(told.count(f"takes no {name}") == 1 for name in dropped)


def test_thoughts_go_back_as_they_came_and_calls_keep_what_signs_them(api):
    """B1: DeepSeek refuses a conversation without them, Gemini one without its signature."""
    signed = CALL | {"extra_content": {"google": {"thought_signature": "abc"}}}
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    first = with_call(signed, reasoning_content="Let me see.", reasoning_details=details)
    (t,), _ = play(api, [first, RIGHT], [EXAMPLE])
    sent = api.requests[1]["messages"][1]
    assert sent["reasoning_content"] == "Let me see." and sent["reasoning_details"] == details
    assert sent["tool_calls"] == [signed] and t.reward == 1.0


REFUSALS = {  # how they say it, with the context, the prompt and what was asked for
    "vLLM": "This model's maximum context length is {c} tokens. However, you requested {s} tokens "
    "({p} in the messages, {n} in the completion). Please reduce the length.",
    "newer vLLM": "'max_tokens' or 'max_completion_tokens' is too large: {n}. This model's maximum "
    "context length is {c} tokens and your request has {p} input tokens ({n} > {c} - {p}).",
    "TGI": "`inputs` tokens + `max_new_tokens` must be <= {c}. Given: {p} `inputs` tokens and {n} "
    "`max_new_tokens`",
    "Anthropic": "input length and `max_tokens` exceed context limit: {p} + {n} > {c}",
    "SGLang": "Requested token count exceeds the model's maximum context length of {c} tokens. You "
    "requested a total of {s} tokens: {p} tokens from the input and {n} for the completion.",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_where_the_limit_does_not_fit_what_is_left_is_asked_for(api, capsys, name):
    """A14: not every row ends with stop = length because of max_new_tokens."""
    context, prompt = 4096, 337

    def script(asked):
        wanted = asked["max_tokens"]
        if prompt + wanted <= context:
            return RIGHT
        numbers = {"c": context, "p": prompt, "n": wanted, "s": prompt + wanted}
        return 400, {"error": {"message": REFUSALS[name].format(**numbers), "code": 400}}

    for wanted in (4096, 4000, 32_768):
        (t,), _ = play(api, script, [EXAMPLE], max_new_tokens=wanted)
        assert (t.stop, t.reward) == GOES_ON
        assert api.requests[-1]["max_tokens"] == context - prompt
        assert f"no room for {wanted} new tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens is too large: {n}. This model supports at most 2000 completion tokens.",
        "max_tokens: {n} > 2000, which is the maximum allowed number of output tokens",
        "Invalid max_tokens value, the valid range of max_tokens is [1, 2000]",
        "`max_tokens` must be less than or equal to `2,000`",
        "`inputs` tokens + `max_new_tokens` must be <= 2000.",
    ],
)
def test_a_limit_on_answers_is_kept_to(api, text):
    """A14."""

    def script(asked):
        wanted = asked["max_tokens"]
        return RIGHT if wanted < 1900 else (400, {"error": text.format(n=wanted)})

    if "inputs" not in text:
        api_limit = 2000
        script_at_limit = script

        def script(asked):
            return RIGHT if asked["max_tokens"] == api_limit else script_at_limit(asked)

    (t,), _ = play(api, script, [EXAMPLE], max_new_tokens=8192)
    assert (t.stop, t.reward) == GOES_ON
    assert api.requests[-1]["max_tokens"] == (2000 if "inputs" not in text else 1000)


def test_an_api_without_room_for_any_answer_ends_the_evaluation(api):
    """A14: with the two numbers."""
    refusal = (400, {"error": "maximum context length is 100"})
    with pytest.raises(UserError, match="no room.*is 100.*asked for 512 new tokens.*smaller max"):
        play(api, lambda asked: refusal, [EXAMPLE] * 3)


def test_an_answer_without_end_is_not_read(api, monkeypatch):
    """B1: it is asked for again, as any nonsense."""
    monkeypatch.setattr(http, "BIGGEST", 100_000)
    huge = (200, b" " * 1_000_000)
    (t,), _ = play(api, [huge, huge, RIGHT], [EXAMPLE])
    assert t.reward == 1.0
    with pytest.raises(UserError, match="has not answered in 6 attempts: an answer of more than"):
        play(api, lambda asked: huge, [EXAMPLE])


def test_refusals_say_what_to_do(api):
    with pytest.raises(UserError, match="wants a key .HTTP 401.*--key_env"):
        episode(api, [(401, {"error": "no key"})])
    with pytest.raises(UserError, match="refuses: HTTP 404.*no such model"):
        episode(api, [(404, {"error": "no such model"})])
    with pytest.raises(UserError, match="endpoint = 'api.x.y': expected http"):
        Endpoint("api.x.y", "gpt", [])


def test_newer_endpoints_want_another_name_for_the_limit(api):
    refusal = (400, {"message": "use 'max_completion_tokens' instead of max_tokens"})
    (t,) = episode(api, [refusal, say("\\boxed{5}")], max_new_tokens=99)
    assert t.reward == 1.0 and "max_tokens" not in api.requests[1]
    assert api.requests[1]["max_completion_tokens"] == 99


def test_the_key_comes_from_the_environment(api, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret\r\n")  # as a file with CRLF gives it
    episode(api, [say("x")], key=key_from("MY_KEY"))
    assert api.headers[0]["Authorization"] == "Bearer secret"
    for key in ("my-\nsecret", "my-schlüssel"):
        with pytest.raises(UserError, match="the key cannot be sent: see --key_env") as caught:
            episode(api, [say("x")], key=key)
        assert "my-" not in str(caught.value) and len(api.requests) == 1
    assert key_from("") == key_from("NOT_THERE") == ""


def test_evaluate_writes_the_same_files_for_an_endpoint(api, tmp_path):
    """From the command line; the model's name is the endpoint's, no folder and no hub id."""
    api.script = lambda asked: say(f"\\boxed{{{eval(asked['messages'][-1]['content'][:5])}}}")
    rows = [{"prompt": f"{n} + 4?", "answer": str(n + 4 + (n == 3))} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--endpoint={api.url}", "--model=gpt", f"--data={tmp_path / 'rows.jsonl'}"]
    evaluate.main([*argv, f"--save_to={tmp_path / 'out'}"])
    numbers = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert numbers["avg@1"] == 0.75 and numbers["new_tokens"] == 7 and numbers["model"] == "gpt"
    assert len((tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()) == 4
    with pytest.raises(UserError, match="model is missing"):
        evaluate.main([f"--endpoint={api.url}", f"--data={tmp_path / 'rows.jsonl'}"])
    with pytest.raises(UserError, match="key_env has no effect without --endpoint"):
        evaluate.main(["--key_env=X"])


def test_a_run_is_evaluated_with_another_engine_than_it_was_trained_with(tmp_path):
    """Options of the run's engine are dropped, those that are given with the other one are not."""
    text = 'engine = "vllm"\nengine_options = ("kv_cache_gib=2.0", "sleep=false")\n'
    (tmp_path / "config.py").write_text(text)
    given = evaluate.Config(run=str(tmp_path))
    kept = evaluate.load_config([], given)
    assert (kept.engine, kept.model) == ("vllm", str(tmp_path))
    assert kept.engine_options == ("kv_cache_gib=2.0", "sleep=false")
    argv = ["--engine=transformers", "--engine_options=deterministic=false"]
    cfg = evaluate.load_config(argv, given)
    assert cfg.engine == "transformers" and cfg.engine_options == ("deterministic=false",)
    cfg = evaluate.load_config(["--engine=server", "--urls=http://127.0.0.1:1"], given)
    assert cfg.urls == ("http://127.0.0.1:1",) and cfg.engine_options == ()
    with pytest.raises(UserError, match="transformers has no option 'kv_cache_gib'"):
        argv = ["--engine=transformers", "--engine_options=kv_cache_gib=1"]
        evaluate.load_config(argv, given)


# Images


class look:
    """Shows what the trajectory has."""

    def __init__(self, example):
        self.images = example["images"]

    def __call__(self, image: int):
        """Crops an image.

        Args:
            image: its number, from 1
        """
        return ["Here:", self.images[image - 1].original.crop((0, 0, 10, 8))]


def sizes_of(message):
    """Of the images in a message that was sent; its texts stay."""
    shown = []
    for part in message["content"]:
        if part["type"] == "text":
            shown.append(part["text"])
        else:
            shown.append(open_image(part["image_url"]["url"]).size)
    return shown


def seen(api, script, tmp_path):
    """A trajectory of a row with a picture of 50 x 40, and the tool `look`."""
    image = Image.new("RGB", (50, 40), "red")
    image.save(tmp_path / "a.png")
    row = {"prompt": "What is <image>?", "images": ["a.png"], "answer": "5"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    examples = data.load(str(tmp_path / "rows.jsonl"), "train")
    api.script = script
    box = Toolbox([look])
    endpoint = Endpoint(api.url, "gpt", box.schemas, pause=0.001)
    selected = rewards.select(("correct",))
    try:
        playing = rollouts(
            examples, endpoint, endpoint, box, Settings(), 0, 1, selected, turn=play_api_turn
        )
        (trajectory,) = run_blocking(playing)
    finally:
        run_blocking(endpoint.close())
    return trajectory, endpoint


def test_images_are_sent_as_data_uris_and_those_of_results_behind_them(api, tmp_path):
    """Two calls in one message: both results stand together, and then the images of both."""
    calls = ("look", '{"image": 1}'), ("look", '{"image": 9}'), ("look", '{"image": 1}')
    script = [say("", *calls), say("The answer is \\boxed{5}.")]
    trajectory, _ = seen(api, script, tmp_path)
    assert trajectory.stop == "answered" and trajectory.reward == 1.0
    assert [picture.shown.size for picture in trajectory.images] == [(50, 40), (10, 8), (10, 8)]
    first, second = (request["messages"] for request in api.requests)
    assert sizes_of(first[0]) == ["What is ", (50, 40), "?"] and second[0] == first[0]
    assert [message["role"] for message in second[1:]] == ["assistant", *["tool"] * 3, "user"]
    results = [message["content"] for message in second[2:5]]
    assert results[0] == "Here:\nimage 2:" and results[2] == "Here:\nimage 3:"
    assert "IndexError" in results[1] or "error" in results[1]
    assert sizes_of(second[5]) == ["image 2:", (10, 8), "image 3:", (10, 8)]


def test_what_a_teacher_saw_is_a_demonstration_with_its_images(api, tmp_path):
    script = [say("", ("look", '{"image": 1}')), say("The answer is \\boxed{5}.")]
    trajectory, _ = seen(api, script, tmp_path)
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [trajectory], None)
    (row,) = data.conversations(str(tmp_path / "rollouts.jsonl"))
    assert row["image_folder"] == str(tmp_path)
    sizes = [open_image(source, tmp_path).size for source in row["images"]]
    assert sizes == [(50, 40), (10, 8)]
    assert count_images(row["messages"]) == 2


def test_an_api_that_takes_no_images_says_so_in_the_numbers(api, tmp_path):
    def script(asked):
        if any(isinstance(message["content"], list) for message in asked["messages"]):
            return 400, {"error": {"message": "this model takes text alone"}}
        return say("Hello.")

    trajectory, endpoint = seen(api, script, tmp_path)
    assert trajectory.stop == "error"
    assert "takes text alone" in endpoint.report()["refused_first"]


def test_an_evaluation_behind_an_api_shows_rows_and_tools_images(api, tmp_path):
    """With the tool crop, as a user types it; max_pixels is another's matter."""
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    row = {"prompt": "What is <image>?", "images": ["a.png"], "answer": "5"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    call = ("crop", '{"image": 1, "box": [0, 0, 500, 500]}')
    api.script = [say("", call), say("\\boxed{5}")]
    argv = [f"--endpoint={api.url}", "--model=gpt", f"--data={tmp_path / 'rows.jsonl'}"]
    with pytest.raises(UserError, match="max_pixels has no effect with --endpoint"):
        evaluate.main([*argv, "--max_pixels=100000"])
    evaluate.main([*argv, "--tools=crop", f"--save_to={tmp_path / 'out'}"])
    numbers = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert numbers["avg@1"] == 1.0 and numbers["images"] == 2
    assert sizes_of(api.requests[1]["messages"][-1]) == ["image 2:", (25, 20)]
    (saved,) = map(json.loads, (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines())
    assert len(saved["images"]) == 2
