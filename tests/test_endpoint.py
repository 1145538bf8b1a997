"""Evaluation behind an OpenAI-compatible chat endpoint: native calls, limits, retries, refusals.

    pytest tests/test_endpoint.py

The endpoint here is a fake on 127.0.0.1; tests/test_vllm.py asks a real one.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import evaluate
import rewards
from engines import chat_api
from engines.base import Sampling
from engines.chat_api import ChatApi, Endpoint
from evaluate import play_api_turn
from rollout import Settings, rollouts
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
            text = json.dumps(said[1]).encode()
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
        run_blocking(ask(api.url, "gpt")("2 and 2?"))
    run_blocking(asked.close())


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
