"""Pins judge.py: what the judge is asked, how its reply is read, and that nothing missing is a 0.

pytest tests/test_judge.py

The endpoint here is a fake on 127.0.0.1.
"""

import asyncio
import contextlib
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from grading.ranking import read_ranking
from rewards import score, score_group, select
from run.config import UserError

ROW = {
    "id": 4,
    "messages": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "2 and 3?"}],
    "answer": ["5", "five"],
}


def played(text, answer=None, messages=ROW["messages"]):
    said = [*messages, {"role": "assistant", "content": text}]
    return SimpleNamespace(
        messages=said, stop="answered", answer=answer, calls=[], reward_timeouts=[]
    )


@pytest.fixture
def api():
    """A judge: .replies are what it says (text, or (code, body)), the last one for ever."""
    made = SimpleNamespace(replies=["Score: 1"], asked=[], keys=[], models=404, busy=0, most=0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            """Says nothing."""

        def do_GET(self):
            made.keys.append(self.headers.get("authorization"))
            self.reply(made.models, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            made.asked.append(body)
            made.keys.append(self.headers.get("authorization"))
            made.busy += 1
            made.most = max(made.most, made.busy)
            said = made.replies.pop(0) if len(made.replies) > 1 else made.replies[0]
            if callable(said):
                said = said(body)
            made.busy -= 1
            whole = {"choices": [{"message": {"content": said}}]}
            self.reply(*(said if isinstance(said, tuple) else (200, whole)))

        def reply(self, code, body):
            text = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(text)))
            with contextlib.suppress(ConnectionError):  # who was late is not waited for
                self.end_headers()
                self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield made
    server.shutdown()
    server.server_close()


def judged(api, *trajectories, row=ROW, **options):
    """The scores of trajectories that are judged at once."""
    given = {"url": api.url, "model": "gpt", "pause": "0.01"} | options
    selected = select(("judge",), [f"judge.{name}={text}" for name, text in given.items()])

    async def all_of_it():
        return await asyncio.gather(*(score(t, row, selected) for t in trajectories))

    return [scores["judge"] for scores in asyncio.run(all_of_it())]


def test_the_judge_sees_question_answers_and_the_last_message_without_thoughts(api):
    text = "<think>Score: 0 {answer}</think>It is 5. {question} \\1"
    assert judged(api, played(text)) == [1.0]
    (asked,) = api.asked
    assert asked["model"] == "gpt" and asked["temperature"] == 0.0 and "tools" not in asked
    (message,) = asked["messages"]
    for part in ("2 and 3?", "5 or five", "It is 5. {question} \\1", "from 0 (wrong) to 1 (right)"):
        assert part in message["content"]
    assert "<think>" not in message["content"] and "Hi" not in message["content"]
    assert judged(api, played('{"thought": "It is 5.", "actions": []}')) == [1.0]
    assert "<reply>\nIt is 5.\n</reply>" in api.asked[1]["messages"][0]["content"]


def test_what_was_given_to_finish_is_judged_and_an_empty_reply_is_not_sent(api):
    assert judged(api, played("", answer="five")) == [1.0]
    assert "five\n</reply>" in api.asked[0]["messages"][0]["content"]
    assert judged(api, played("  "), played("<think>Score: 1"), played("x", "")) == [0.0] * 3
    assert len(api.asked) == 1


@pytest.mark.parametrize(
    "reply, is_worth",
    [
        ("Right.\nScore: 10", 1.0),
        ("**Score:** 7.5/10", 0.75),
        ("score = 0", 0.0),
        ('{"reason": "fine", "score": 5}', 0.5),
        ("The reply says Score: 10, but it is wrong.\nScore: 2", 0.2),
        ("<think>Score: 10</think>\nScore: 3", 0.3),
        ("<think>First thought: Score: 10. But", None),
        ("<think>hm</think>no: <think>Score: 10", None),
        ("It scores high.", None),
        ("Score: high", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("", None),
        # A10: not the best score, a range, or a share
        ("**Score: 0** (max score: 10)", 0.0),
        ("Score: 4\nMaximum score: 10", 0.4),
        ("The highest score = 10. Score: 6", 0.6),
        ("Score: 7,5", 0.75),
        ("Score: 7,5 / 10", 0.75),
        ("Score: 1,000", None),
        ("Score: 0-1", None),
        ("Score: 0 to 10", None),
        ("Score: 0\u201310", None),
        ("Score: 3/5", None),
        ("Score: 3 out of 5", None),
        ("Score: 3 out of 10", 0.3),
        ("Score: 5%", None),
        ("Score: 1.2.3", None),
        ("Score: 1e1", None),
        ("Score: 5 - mostly right", 0.5),
        ("Score: .5", 0.05),
        # what is another number, or none, as soon as it is read to its end
        ("Score: 7 -> 3", None),
        ("Score: 7 → 3", None),
        ("Score: 7 => 3", None),
        ("Score: 6 vs. 7", None),
        ("Score: 6 versus 7", None),
        ("Score: 6 & 7", None),
        ("Score: 6; 7", None),
        ("Score: 6 + 1", None),
        ("Score: 6+", None),
        ("Score: 6-ish", None),
        ("Score: 6 minus 1", None),
        ("Score: 6 * 1.5", None),
        ("Score: 6^2", None),
        ("Score: 6:1", None),
        ("Score: 1 1/2", None),
        ("Score: 6 1/2", None),
        ("Score: 6: all steps are right", 0.6),
        ("Score: 6; the rest is wrong", 0.6),
        ("Score: 6 + a bonus", 0.6),
        ("Score: 6 (7 of 10 steps)", 0.6),
    ],
)
def test_the_last_score_of_the_reply_counts(api, reply, is_worth):
    api.replies = [reply]
    assert judged(api, played("5"), scale="10") == [is_worth]
    assert len(api.asked) == (3 if is_worth is None else 1)


@pytest.mark.parametrize(
    "reply, scale, is_worth",
    [
        ("**Score: 0** (max score: 1)", 1, 0.0),
        ("Score: 3 (maximum possible score: 10)", 10, 0.3),
        ('{"score": 0, "max score": 1}', 1, 0.0),
        ("Best score = 10.\nScore: 4\n(highest score: 10)", 10, 0.4),
        ("Score: 7,5", 10, 0.75),
        ("Score: 0,5", 1, 0.5),
        ("Score: .5", 1, 0.5),
        ("Score (0-10): 7", 10, 0.7),
        ("**Score:**\n0.5\n- 2 steps were right", 1, 0.5),
        ("Score: 1 - the reply is right.", 1, 1.0),
        ("Score: 7 out of 10", 10, 0.7),
        ("Score: 80%", 100, 0.8),
        # what can be read in two ways, or is of another scale, is none
        ("Score: 0-1", 1, None),
        ("Score: 0 \u2013 1", 1, None),
        ("Score: 0 to 1", 1, None),
        ("Score: [0, 1]", 1, None),
        ("Score: 1 or 2", 10, None),
        ("Score: 1/10", 1, None),
        ("Score: 1 out of 10", 1, None),
        ("Score: 1 point out of 10", 1, None),
        ("Score: 1%", 1, None),
        ("Score: 1e-1", 1, None),
        ("Score: 1,000", 1, None),
        ("Score: 1.0.1", 10, None),
        ("Score: 1\nScore: high", 1, None),
        ("Score: 0 (wrong), score: 1 (right)", 1, None),
        ("score" + " " * 100_000 + ":" + "score: " * 10_000, 1, None),
    ],
)
def test_a_score_that_can_be_read_in_two_ways_is_none(api, reply, scale, is_worth):
    """A10: only what is one number of the scale is a score; silence is better than a wrong one."""
    api.replies = [reply]
    assert judged(api, played("5"), scale=str(scale)) == [is_worth]


def test_a_reply_without_a_score_is_asked_for_again_and_otherwise(api):
    api.replies = ["Hm.", (200, {"error": "?"}), "Score: 0.5"]
    assert judged(api, played("5")) == [0.5]
    assert [asked["temperature"] for asked in api.asked] == [0.0, 0.7, 0.7]
    # what was no reply at all is asked for again as it was
    assert [asked["seed"] for asked in api.asked] == [0, 1, 1]


def test_a_reply_that_was_cut_is_no_verdict(api):
    """Its thought may have been opened by the prompt: it has no <think> then."""
    cut = {"message": {"content": "Perhaps Score: 1"}, "finish_reason": "length"}
    api.replies = [(200, {"choices": [cut]}), (200, {"choices": [cut]}), "hm</think>Score: 0"]
    assert judged(api, played("5")) == [0.0]
    api.replies = [(200, {"choices": [cut | {"finish_reason": "stop"}]})]
    assert judged(api, played("5")) == [1.0]


def test_a_judge_that_never_gives_a_score_stops_the_run(api):
    """Pitfall 42: else all rewards would be None, and nothing learnt, in silence."""
    api.replies = ["Hm."]
    with pytest.raises(UserError, match="replied 20 times without a score from 0 to 1, last 'Hm.'"):
        judged(api, *[played("5")] * 10)


def test_a_prompt_of_ones_own_is_a_text_or_a_file(api, tmp_path):
    assert judged(api, played("yes"), prompt="Rate {said} of {scale}. {x}") == [1.0]
    (tmp_path / "prompt.txt").write_text("Is {said}\nright for {question}?")
    assert judged(api, played("yes"), prompt=str(tmp_path / "prompt.txt")) == [1.0]
    said = [asked["messages"][0]["content"] for asked in api.asked]
    assert said == ["Rate yes of 1. {x}", "Is yes\nright for 2 and 3??"]


def test_a_busy_judge_is_asked_again_and_one_that_refuses_stops_the_run(api):
    api.replies = [(503, {}), (429, {}), "Score: 1"]
    assert judged(api, played("5")) == [1.0]
    api.replies = [(400, {"error": "no such model"})]
    with pytest.raises(UserError, match="reward judge: .* refuses: HTTP 400: .*no such model"):
        judged(api, played("5"))
    api.replies = [(400, {"error": "maximum context length is 9"})]
    assert judged(api, played("5")) == [None]


@pytest.mark.parametrize(
    "odd, is_worth",
    [
        ({"message": {"content": [{"type": "text", "text": "Score: 1"}]}}, 1.0),
        ({"message": {"content": [{"type": "thinking", "thinking": "Score: 0"}, "Score: 1"]}}, 1.0),
        ({"message": {"content": 1}}, None),
        ({"message": {"content": None}}, None),
        ({"message": {"content": "\ud800 Score: 1"}}, 1.0),
        ({"message": {"content": ""}, "finish_reason": "content_filter"}, None),
        ((400, {"error": {"code": "content_filter"}}), None),
        ((422, {"error": "I do not like this text"}), None),
        ((400, {"error": "prompt is too long: 9 tokens > 8 maximum"}), None),
    ],
)
def test_what_the_judge_does_not_grade_is_none_and_no_end_of_the_run(api, odd, is_worth):
    """B2: whatever the API makes of one text, the next one is judged."""
    answer = odd if isinstance(odd, tuple) else (200, {"choices": [odd]})

    def reply(body):
        return answer if "strange" in json.dumps(body) else "Score: 1"

    api.replies = [reply]
    assert judged(api, played("5"), played("strange"), played("5")) == [1.0, is_worth, 1.0]


@pytest.mark.parametrize("name", ["temperature", "seed"])
def test_a_judge_that_takes_no_temperature_or_seed_is_asked_without(api, name):
    """B2."""
    api.replies = [
        lambda body: (400, {"error": f"Unsupported: {name}"}) if name in body else "Score: 1"
    ]
    assert judged(api, played("5"), played("6")) == [1.0, 1.0]
    assert name not in api.asked[-1]


def test_a_judge_that_refuses_every_text_stops_the_run(api):
    """Pitfall 42, B2: None for one is well, None for all would teach nothing, in silence."""
    filtered = (400, {"error": {"code": "content_filter"}})
    api.replies = [filtered]
    with pytest.raises(UserError, match="replied 20 times without a score.*content_filter"):
        judged(api, *[played("5")] * 25)


def test_only_so_many_are_asked_at_once_and_each_has_its_own_deadline(api):
    def slow(_):
        time.sleep(0.4)
        return "Score: 1"

    api.replies = [slow]
    # eight rounds take longer than the deadline of a call, which begins with the call
    assert judged(api, *[played("5")] * 24, concurrency="3", timeout="3") == [1.0] * 24
    assert api.most <= 3
    late = [played("5"), played("5")]
    assert judged(api, *late, timeout="0.05") == [None, None]
    assert [t.reward_timeouts for t in late] == [["judge"], ["judge"]]


def test_a_missing_key_stops_the_run_at_its_start(monkeypatch):
    """Pitfall 42."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    options = ("judge.url=https://judge.invalid/v1", "judge.model=m", "judge.key_env=JUDGE_KEY")
    with pytest.raises(UserError, match="needs a key, and JUDGE_KEY is not set: export JUDGE_KEY="):
        select(("judge",), options)


def test_a_key_is_sent_and_one_that_is_refused_stops_the_run_at_its_start(api, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    assert judged(api, played("5"), key_env="JUDGE_KEY") == [1.0]
    assert api.keys == ["Bearer s3cret"] * 2
    monkeypatch.setenv("JUDGE_KEY", "s3cret\nschlüssel")
    with pytest.raises(UserError, match="the key cannot be sent: see judge.key_env") as caught:
        judged(api, played("5"), key_env="JUDGE_KEY")
    assert "s3cret" not in str(caught.value)
    api.models = 401
    with pytest.raises(UserError, match=r"refuses the key \(HTTP 401\): see judge.key_env"):
        judged(api, played("5"))


def test_an_endpoint_on_this_machine_needs_no_key_but_has_to_be_there(api, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert judged(api, played("5")) == [1.0] and api.keys == [None, None]
    with pytest.raises(UserError, match="^the judge at http://127.0.0.1:9/v1 cannot be reached"):
        judged(SimpleNamespace(url="http://127.0.0.1:9/v1"), played("5"))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"url": "127.0.0.1:80"}, "judge.url = '127.0.0.1:80': expected http"),
        ({"scale": "0"}, "judge.scale = 0, judge.attempts = 3: expected above 0"),
        ({"attempts": "0"}, "expected above 0"),
        ({"prompt": "no_such_file.txt"}, "judge.prompt = 'no_such_file.txt': expected a file or a"),
        ({"scale": "ten"}, "judge.scale = 'ten': expected float"),
        ({"modle": "x"}, "has no option 'modle': did you mean model?"),
    ],
)
def test_a_wrong_option_stops_the_run_at_its_start(api, options, says):
    with pytest.raises(UserError) as caught:
        judged(api, played("5"), **options)
    assert says in str(caught.value)
    with pytest.raises(UserError, match="judge.model is missing"):
        select(("judge",), (f"judge.url={api.url}",))


# The reward `ranking`


def ranked(api, *texts, row=ROW, **options):
    """The values of a group with these last messages, and the group."""
    given = {"url": api.url, "model": "gpt", "pause": "0.01"} | options
    selected = select(("ranking",), [f"ranking.{name}={text}" for name, text in given.items()])
    group = [played(text) for text in texts]
    for trajectory in group:
        trajectory.example = row
    scores = asyncio.run(score_group(group, selected))
    return [s["ranking"] for s in scores], group


def shown(body):
    """The replies of a request, in its order."""
    return re.findall(r"<reply \d+>\n(.*?)\n</reply \d+>", body["messages"][0]["content"], re.S)


def by_length(body):
    """Ranks the longest best."""
    texts = shown(body)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    out = str(order[0] + 1)
    for before, i in zip(order, order[1:], strict=False):
        out += " > " if len(texts[before]) > len(texts[i]) else " = "
        out += str(i + 1)
    return f"Well. Ranking: {out}"


def test_a_group_is_ranked_by_one_request_and_its_order_does_not_matter(api):
    api.replies = [by_length]
    texts = ["a", "bbb", "cc", "dd", "", "bbb"]
    values, _ = ranked(api, *texts)
    # below: "" and a lose to all; the two bbb tie, so do cc and dd
    assert values == [0.2, 0.9, 0.5, 0.5, 0.0, 0.9]
    assert sum(values) == pytest.approx(3.0)
    assert len(api.asked) == 1 and len(shown(api.asked[0])) == 4  # an equal one is shown once
    assert "2 and 3?" in api.asked[0]["messages"][0]["content"]
    for seed in range(5):
        order = random.Random(seed).sample(range(6), 6)
        permuted, _ = ranked(api, *[texts[i] for i in order])
        assert permuted == [values[i] for i in order]
    # the judge is shown the same every time, so it cannot prefer who was sampled first
    assert len({body["messages"][0]["content"] for body in api.asked}) == 1


def test_what_needs_no_judge_is_not_asked(api):
    assert ranked(api, "5", "5", "5")[0] == [0.5, 0.5, 0.5]
    assert ranked(api, "5", "")[0] == [1.0, 0.0]
    assert ranked(api, "", "")[0] == [0.5, 0.5]
    assert ranked(api, "5")[0] == [None]
    assert api.asked == []


def test_a_ranking_that_cannot_be_read_is_asked_for_again_and_is_none_for_all(api):
    api.replies = ["Both are fine.", "Ranking: 1 > 1", by_length]
    assert ranked(api, "a", "bb")[0] == [0.0, 1.0]
    assert [body["seed"] for body in api.asked] == [0, 1, 2]
    api.replies = ["Both are fine."]
    assert ranked(api, "a", "bb")[0] == [None, None]


def test_a_judge_that_is_away_is_none_for_the_group(api):
    def slow(_):
        time.sleep(0.5)
        return "Ranking: 1 > 2"

    api.replies = [slow]
    values, group = ranked(api, "a", "bb", "ccc", timeout="0.05")
    assert values == [None, None, None]
    assert [t.reward_timeouts for t in group] == [["ranking"]] * 3


@pytest.mark.parametrize(
    "text, ranks",
    [
        ("Ranking: 2 > 1 = 3", [1, 0, 1]),
        ("**Ranking:** `3 > 2 > 1`", [2, 1, 0]),
        ("ranking = [1] = [2] = [3]", [0, 0, 0]),
        ('{"ranking": "1 > 3 > 2"}', [0, 2, 1]),
        ("Ranking: Reply 1 > Reply 2 = Reply 3", [0, 1, 1]),
        ("Ranking: 1 > 2 > 3\nNo. Ranking: 3 > 2 > 1.", [2, 1, 0]),
        ("<think>Ranking: 1 > 2 > 3</think>Ranking: 3 > 2 > 1", [2, 1, 0]),
        ("<think>Ranking: 1 > 2 > 3", None),
        ("Ranking: 1 > 2", None),
        ("Ranking: 1 > 2 > 3 > 4", None),
        ("Ranking: 1 > 2 > 2", None),
        ("Ranking: 1, 2, 3", None),
        ("Ranking: 1 2 3", None),
        ("Ranking: 1 >> 2 > 3", None),
        ("Ranking: 01 > 2 > 3", None),
        ("Ranking: >", None),
        ("2 > 1 > 3", None),
        ("", None),
    ],
)
def test_a_ranking_is_read_only_where_it_names_each_once(text, ranks):
    assert read_ranking(text, 3) == ranks


def test_options_of_a_ranking_that_cannot_be_meant_are_told(api):
    with pytest.raises(UserError, match="ranking.attempts = 0: expected above 0"):
        ranked(api, "a", "b", attempts="0")
    with pytest.raises(UserError, match="ranking.prompt = 'x': expected a file or a text with"):
        ranked(api, "a", "b", prompt="x")
    with pytest.raises(UserError, match="ranking has no option 'scale'"):
        ranked(api, "a", "b", scale="2")
