"""serve/retrieve.py: Search-R1's protocol, odd requests, limits, and a server that is killed.

    pytest tests/test_retrieve.py

One server runs as a process of its own, on 127.0.0.1. How fast it is: bench/retrieve.py.
"""

import asyncio
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from ports import free_port
from raw_requests import exchanged
from until import PATIENCE, until

from run.config import UserError, parse
from tools import Toolbox
from tools.retrieval.corpus import Passage

pytest.importorskip("tantivy", reason='tantivy is missing: pip install -e ".[search]"')
from serve import retrieve

ROOT = Path(__file__).parent.parent
PASSAGES = [
    {"id": "n7", "contents": '"Oslo"\nOslo is the capital of Norway. It lies at a fjord.'},
    {"id": 8, "contents": '"Rome"\nRome is the capital of Italy.'},
    {"title": "Bonn", "text": "Bonn was a capital too; it lies at the Rhine."},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "wiki.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    return str(path)


@contextmanager
def serving(corpus, *arguments, env=None):
    """A server as a process; its port, and the process."""
    command = [sys.executable, "-m", "serve.retrieve", f"--corpus={corpus}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving 3 passages at http://127.0.0.1:"), line
        yield int(line.rpartition(":")[2].partition("/")[0]), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def port(corpus):
    with serving(corpus, "--port=0", "--topk=2") as (port, _):
        yield port


def post(port, request):
    url = f"http://127.0.0.1:{port}/retrieve"
    answer = httpx.post(url, content=json.dumps(request), timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- the protocol


def test_it_answers_as_search_r1s_server_does(port):
    """The request is the one that its clients send."""
    request = {"queries": ["capital of Norway", "the Rhine"], "topk": 1, "return_scores": True}
    answer = post(port, request)
    assert list(answer) == ["result"] and len(answer["result"]) == 2
    ((oslo,), (bonn,)) = answer["result"]
    assert oslo["document"] == {"id": "n7", "contents": PASSAGES[0]["contents"]}
    assert isinstance(oslo["score"], float) and oslo["score"] > 0
    text = "Bonn\nBonn was a capital too; it lies at the Rhine."
    assert bonn["document"] == {"id": "2", "contents": text}


def test_the_request_of_search_r1s_own_clients_and_what_they_read_of_the_answer(port):
    """Its trainer (search_r1/llm_agent/generation.py at commit 54f5bb86) and its script
    (search_r1/search/retrieval_request.py at 0789f5e3) both post a JSON of these three keys by
    `requests`, with scores; they read result[i][j]["document"]["contents"], whose first line is
    the title. A batch in which nobody searches sends no queries, and expects no results."""
    requests = pytest.importorskip("requests")
    queries = ["capital of Norway", "What is the capital of Italy?", "café “Rhine”", "\n"]
    for topk, asked in ((3, queries), (5, queries[:1]), (3, [])):
        payload = {"queries": asked, "topk": topk, "return_scores": True}
        request = requests.Request("POST", f"http://127.0.0.1:{port}/retrieve", json=payload)
        sent = request.prepare()
        assert sent.body == json.dumps(payload).encode()  # not one byte is of our making
        assert sent.headers["content-type"] == "application/json"
        with requests.Session() as session:
            session.trust_env = False  # no proxy between us
            answer = session.send(sent, timeout=PATIENCE)
        answer.raise_for_status()
        found = answer.json()["result"]
        assert len(found) == len(asked)
        for passages in found:
            assert len(passages) <= topk
            for passage in passages:
                title, *lines = passage["document"]["contents"].split("\n")
                assert title.strip('"') in ("Oslo", "Rome", "Bonn") and title.strip('"') in lines[0]
                assert isinstance(passage["score"], float)


def test_without_scores_a_passage_is_its_document_and_topk_has_a_default(port):
    (found,) = post(port, {"queries": ["capital"]})["result"]
    assert [document["id"] for document in found] == ["8", "2"]  # --topk=2; shorter is better
    for none in (None, 0):
        assert post(port, {"queries": ["capital"], "topk": none})["result"] == [found]
    assert post(port, {"queries": []})["result"] == []
    assert post(port, {"queries": ["", "xylophone", "\ud800"], "other": 1})["result"] == [[]] * 3


def test_our_search_tool_is_a_client_of_it(port):
    url = f"search.url=http://127.0.0.1:{port}/retrieve"
    box = Toolbox(["search"], timeout=PATIENCE, options=[url, "search.k=1"])

    async def call():
        try:
            return await box.open().call("search", {"query": "Italy"})
        finally:
            await box.close()

    content, error, _ = asyncio.run(call())
    assert error is None
    assert content == 'Doc 1(Title: "Rome") Rome is the capital of Italy.'


def test_health_and_metrics_tell_what_was_done(corpus):
    with serving(corpus, "--port=0") as (port, _):
        post(port, {"queries": ["Oslo", "Rome"]})
        assert httpx.post(f"http://127.0.0.1:{port}/retrieve", content=b"{").status_code == 400
        health = httpx.get(f"http://127.0.0.1:{port}/health").json()
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert health["status"] == "healthy" and health["passages"] == 3
    done = ("requests", "queries", "refused", "busy", "failed", "waiting")
    assert [health[name] for name in done] == [1, 2, 1, 0, 0, 0]
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nnanotool_retrieve_queries_total 2\n" in metrics.text
    for line in metrics.text.splitlines():  # the text format of Prometheus
        assert re.fullmatch(r"# TYPE \w+ (counter|gauge)|\w+ [0-9.e+-]+", line), line


# -- odd requests


def http(method="POST", path="/retrieve", body=b"", host="127.0.0.1", more=""):
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n{more}\r\n".encode() + body


def asking(**request):
    return http(body=json.dumps(request).encode())


FORM = 'expected {"queries": '
TEXTS = "queries: expected a list of texts"
TOPK = "topk: expected a whole number from 1 to 100, not "
CHUNKED = "transfer-encoding: chunked\r\n"
LARGE = b'{"queries": ["' + b"x" * retrieve.MOST_BYTES + b'"]}'
ODD = [
    (http(body=b""), 400, "no JSON"),
    (http(body=b"{"), 400, "no JSON"),
    (http(body=b"queries=oslo"), 400, "no JSON"),
    (http(body=b"\xff\xfe"), 400, "no JSON"),
    (http(body=b"\0" * 100), 400, "no JSON"),
    (http(body=b"[" * 100_000), 400, "no JSON"),
    (http(body=b'{"a":' * 100_000), 400, "no JSON"),
    (http(body=b"1" * 10_000), 400, "no JSON"),
    (http(body=b"null"), 422, FORM),
    (http(body=b"NaN"), 422, FORM),
    (http(body=b"[]"), 422, FORM),
    (http(body=b'"queries"'), 422, FORM),
    (http(body=b"{}"), 422, FORM),
    (asking(query="Oslo"), 422, FORM),
    (asking(queries="Oslo"), 422, TEXTS),
    (asking(queries=None), 422, TEXTS),
    (asking(queries={"0": "Oslo"}), 422, TEXTS),
    (asking(queries=["Oslo", None]), 422, TEXTS),
    (asking(queries=[["Oslo"]]), 422, TEXTS),
    (asking(queries=[7]), 422, TEXTS),
    (asking(queries=["Oslo"] * 513), 422, "at most 512, not 513"),
    (asking(queries=["x" * 10_001]), 422, "at most 10000 characters, not 10001"),
    (asking(queries=["Oslo"], topk=-1), 422, TOPK + "-1"),
    (asking(queries=["Oslo"], topk=101), 422, TOPK + "101"),
    (asking(queries=["Oslo"], topk=10**30), 422, TOPK + "1000"),
    (asking(queries=["Oslo"], topk=1.5), 422, TOPK + "1.5"),
    (asking(queries=["Oslo"], topk="3"), 422, TOPK + '"3"'),
    (asking(queries=["Oslo"], topk=True), 422, TOPK + "true"),
    (asking(queries=["Oslo"], topk=[3]), 422, TOPK + "[3]"),
    (asking(queries=["Oslo"], topk=float("nan")), 422, TOPK + "NaN"),
    (asking(queries=["Oslo"], return_scores="yes"), 422, "return_scores: expected true or false"),
    (asking(queries=["Oslo"], return_scores=1), 422, "return_scores: expected true or false"),
    (http(body=LARGE), 413, "at most 4194304 bytes"),
    (http("GET"), 405, "/retrieve is asked by POST, not GET"),
    (http("DELETE"), 405, "/retrieve is asked by POST, not DELETE"),
    (http("POST", "/health"), 405, "/health is asked by GET, not POST"),
    (http(path="/"), 404, "there is no /; there are /retrieve, /health, /metrics"),
    (http(path="/retrieve/"), 404, "there is no /retrieve/"),
    (http("GET", "/../../etc/passwd"), 404, "there is no /../../etc/passwd"),
    (http("GET", "/" + "x" * 5000), 404, "there is no /xxx"),
    (http(host="evil.example"), 421, "this server is for this machine"),
    (http(host="127.0.0.1.evil.example:80"), 421, "this server is for this machine"),
    (http(more="x: " + "y" * 100_000 + "\r\n"), 400, ""),
    (http(more="content-length: 5\r\n", body=b"{}"), 400, ""),
    (b"GET / HTTP/9.9\r\n\r\n", 421, ""),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, ""),  # TLS
    (b"SSH-2.0-OpenSSH\r\n\r\n", 400, ""),
    (
        f"POST /retrieve HTTP/1.1\r\nhost: localhost\r\n{CHUNKED}\r\nzz\r\n".encode(),
        400,
        "",
    ),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_an_odd_request_is_answered_clearly_and_the_server_goes_on(port, number):
    sent, status, words = ODD[number]
    head, _, body = exchanged(port, sent).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), head[:100]
    if words:
        (said,) = json.loads(body).items()
        assert said[0] == "error" and words in said[1]
    assert len(body) < 1000
    assert post(port, {"queries": ["Oslo"]})["result"][0][0]["id"] == "n7"


def test_there_are_forty_odd_requests():
    assert len(ODD) >= 40


# -- limits


class Held:
    """An index that searches when it is let."""

    def __init__(self):
        self.may_search = threading.Event()
        self.batches = []

    def __len__(self):
        return 1

    def find(self, queries, k):
        self.may_search.wait(PATIENCE)
        self.batches.append(list(queries))
        if "broken" in queries:
            raise OSError("the disk has gone")
        return [[Passage(str(i), query, float(-i)) for i in range(k)] for query in queries]


def request_of(query, topk=1):
    return json.dumps({"queries": [query], "topk": topk, "return_scores": True}).encode()


def with_retriever(work, **keys):
    """Runs work(retriever, index) beside the retriever's own task."""
    index = Held()

    async def run():
        retriever = retrieve.Retriever(index, retrieve.Config(corpus="x", **keys))
        working = asyncio.create_task(retriever.work())
        try:
            return await work(retriever, index)
        finally:
            index.may_search.set()
            working.cancel()
            await asyncio.wait({working})

    return asyncio.run(run())


def test_what_waits_is_searched_together_and_each_gets_its_own():
    async def work(retriever, index):
        asked = [retriever.retrieve(request_of(f"q{i}", 1 + i % 3)) for i in range(200)]
        tasks = [asyncio.ensure_future(one) for one in asked]
        await asyncio.sleep(0)
        index.may_search.set()
        return await asyncio.gather(*tasks), index.batches

    answers, batches = with_retriever(work)
    for i, answer in enumerate(answers):
        (found,) = answer["result"]
        assert [hit["document"]["contents"] for hit in found] == [f"q{i}"] * (1 + i % 3)
    assert sum(map(len, batches)) == 200 and max(map(len, batches)) == retrieve.TOGETHER


def test_more_than_can_wait_are_told_to_come_again_and_so_is_who_waits_for_too_long():
    async def work(retriever, index):
        first = [asyncio.ensure_future(retriever.retrieve(request_of(f"{i}"))) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(retrieve.Refused, match="2 requests wait already") as full:
            await retriever.retrieve(request_of("3"))
        outcomes = await asyncio.gather(*first, return_exceptions=True)
        index.may_search.set()
        after = await retriever.retrieve(request_of("4"))
        return full.value.status, outcomes, after

    status, outcomes, after = with_retriever(work, most_waiting=2, timeout=0.2)
    assert status == 503
    assert [str(outcome) for outcome in outcomes] == ["it took longer than 0.2 s"] * 2
    assert after["result"][0][0]["document"]["contents"] == "4"


def test_an_index_that_fails_is_told_and_the_next_request_is_answered():
    async def work(retriever, index):
        index.may_search.set()
        with pytest.raises(OSError, match="the disk has gone"):
            await retriever.retrieve(request_of("broken"))
        return await retriever.retrieve(request_of("next"))

    assert with_retriever(work)["result"][0][0]["document"]["contents"] == "next"


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "corpus = '': expected a file of passages"),
        (["--corpus=x", "--topk=0"], "topk = 0"),
        (["--corpus=x", "--topk=101"], "topk = 101: expected at most 100"),
        (["--corpus=x", "--port=70000"], "port = 70000"),
        (["--corpus=x", "--timeout=0"], "timeout = 0"),
        (["--corpus=x", "--host=0.0.0.0"], "lets other machines in: set the environment"),
        (["--corpus=x", "--corpsu=y"], "did you mean corpus"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(arguments, why, monkeypatch):
    monkeypatch.delenv("NANOTOOL_TOKEN", raising=False)
    with pytest.raises(UserError, match=re.escape(why)):
        parse(retrieve.Config, arguments, retrieve.check)


def test_with_a_token_only_who_has_it_is_answered(corpus, monkeypatch):
    monkeypatch.setenv("NANOTOOL_TOKEN", "the secret")
    monkeypatch.setenv("MY_TOKEN", "the secret\r\n")
    with serving(corpus, "--port=0") as (port, _):
        url = f"http://127.0.0.1:{port}/retrieve"
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert httpx.post(url, json={"queries": ["x"]}, headers=headers).status_code == 401
        options = [f"search.url={url}", "search.k=1"]
        outcomes = []
        for more in ([], ["search.token_env=MY_TOKEN"]):
            box = Toolbox(["search"], timeout=PATIENCE, options=options + more)
            outcomes.append(asyncio.run(box.open().call("search", {"query": "Italy"})))
    assert outcomes[0][1] == "network" and "refuses the key" in outcomes[0][0]
    assert outcomes[1][1] is None and "Rome" in outcomes[1][0]


# -- killed


def test_a_server_that_is_killed_and_started_again_loses_no_call(corpus):
    """While trajectories use it: the search tool asks again until it is back."""
    port = free_port()
    url = f"search.url=http://127.0.0.1:{port}/retrieve"
    options = [url, "search.k=1", "search.cache=false", "search.retries=1000"]
    box = Toolbox(["search"], concurrency=8, timeout=PATIENCE, options=options)
    outcomes = []
    was_killed = threading.Event()
    is_back = threading.Event()

    async def trajectory():
        session = box.open()
        while not is_back.is_set():
            outcomes.append((await session.call("search", {"query": "fjord"}))[:2])
        outcomes.append((await session.call("search", {"query": "fjord"}))[:2])
        await session.close()

    async def trajectories():
        await asyncio.gather(*(trajectory() for _ in range(8)))
        await box.close()

    playing = threading.Thread(target=asyncio.run, args=(trajectories(),), daemon=True)
    for _ in range(3):
        with serving(corpus, f"--port={port}"):
            if not playing.is_alive() and not was_killed.is_set():
                playing.start()
            before = len(outcomes)
            assert until(lambda before=before: len(outcomes) > before + 20)
        was_killed.set()  # by SIGKILL, in the middle of calls
    with serving(corpus, f"--port={port}"):
        is_back.set()
        playing.join(PATIENCE)
        assert not playing.is_alive()
    assert len(outcomes) > 60 and not box.errors
    for content, error in outcomes:
        assert error is None and "Norway" in content
