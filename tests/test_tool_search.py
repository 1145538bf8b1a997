"""The search tool: what is found and how it is shown, the index on disk, servers and their errors.

    pytest tests/test_tool_search.py

The servers are fakes on 127.0.0.1. How fast it is: bench/search.py.
"""

import asyncio
import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from run.config import UserError
from tools import NetworkError, Toolbox, ToolError
from tools.retrieval import bm25
from tools.retrieval import corpus as corpora
from tools.retrieval.bm25 import Index
from tools.search import search

ROOT = Path(__file__).parent.parent
PASSAGES = [
    {"id": "0", "contents": '"Oslo"\nOslo is the capital of Norway. It lies at a fjord.'},
    {"id": "1", "contents": '"Rome"\nRome is the capital of Italy.'},
    {"id": "2", "title": "Café Zürich", "text": "A café with 30 kinds of running cake."},
    {"id": "3", "text": "A passage without any title \ud800"},
]


def write(path, rows, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    pytest.importorskip("tantivy", reason='tantivy is missing: pip install -e ".[search]"')
    return write(tmp_path / "wiki.jsonl", PASSAGES)


def texts(index, query, k):
    """What it finds, as texts."""
    return [passage.contents for passage in index.find_one(query, k)]


def ask(tool, query):
    return asyncio.run(tool(query))


def failed(tool, query, kind=ToolError):
    with pytest.raises(kind) as caught:
        ask(tool, query)
    assert kind is NetworkError or not isinstance(caught.value, NetworkError)
    return caught.value.kind, caught.value.text


def test_passages_are_shown_as_search_r1_shows_them_the_best_first(corpus):
    tool = search(corpus=corpus, k=2)
    assert ask(tool, "What is the capital of Norway?") == (
        'Doc 1(Title: "Oslo") Oslo is the capital of Norway. It lies at a fjord.\n'
        'Doc 2(Title: "Rome") Rome is the capital of Italy.'
    )
    assert ask(tool, "title passage").startswith("Doc 1 A passage without any title")
    short = ask(search(corpus=corpus, k=1, chars=20), "Norway")
    assert short == 'Doc 1(Title: "Oslo")…'


@pytest.mark.parametrize(
    "query",
    ["CAFE zurich", "café", "Runs", 'cake AND (NOT "', "kind:cake^3 *", "text:[a TO z] cakes"],
)
def test_case_accents_and_endings_do_not_matter_and_operators_mean_nothing(corpus, query):
    assert "(Title: Café Zürich)" in ask(search(corpus=corpus, k=1), query)


def test_nothing_to_look_for_and_nothing_found_are_said(corpus):
    tool = search(corpus=corpus)
    assert failed(tool, " \n") == (
        "bad_arguments",
        "error: the query is empty: say what to look for",
    )
    assert ask(tool, "xylophone") == "(nothing found for 'xylophone')"
    assert ask(tool, "?!") == "(nothing found for '?!')"
    assert ask(tool, "x" * 100_000).startswith("(nothing found for 'xxx")
    assert "Oslo" in ask(tool, "\ud800 Oslo")  # JSON can hold half a character
    assert "Oslo" in ask(tool, " ".join(f"word{i}" for i in range(50)) + " Oslo" * 50_000)


def test_equal_passages_come_in_the_order_of_the_corpus(tmp_path, monkeypatch):
    """Also when the index is in several parts, whose own order is random."""
    pytest.importorskip("tantivy")
    monkeypatch.setattr(bm25, "HEAP", 15_000_000)  # the least that tantivy takes
    same = " ".join(f"word{i}" for i in range(60))
    rows = [{"contents": f"{same}\n{'word9 ' * (i % 2)}{i} {i * i}"} for i in range(20_000)]
    index = Index(write(tmp_path / "same.jsonl", rows))
    assert index.searcher.num_segments > 1
    found = texts(index, "word9 word8", 5)  # word9 twice is better
    assert [text.split()[-2] for text in found] == ["1", "3", "5", "7", "9"]
    assert texts(index, "word8 word9", 3) == found[:3]
    # in so many passages a word that all of them have counts only where no other is known
    assert texts(index, "word9 400 word8", 9) == [rows[n]["contents"] for n in (20, 400)]
    assert len(texts(index, "word9 xylophone", 9)) == 9


def test_the_index_stays_beside_the_corpus_until_the_corpus_changes(corpus, monkeypatch):
    made = []
    fill = bm25._fill
    monkeypatch.setattr(bm25, "_fill", lambda *given: made.append(1) or fill(*given))
    folder = Path(corpus + ".bm25")
    assert len(Index(corpus)) == 4 and folder.is_dir() and made == [1]
    old = Index(corpus)
    assert texts(old, "fjord", 1)[0].startswith('"Oslo"') and made == [1]
    write(corpus, [*PASSAGES, {"title": "Bonn", "text": "Bonn lies at the Rhine."}])
    new = Index(corpus)
    assert len(new) == 5 and "Rhine" in texts(new, "bonn", 1)[0] and made == [1, 1]
    assert "fjord" in texts(old, "oslo", 1)[0]  # goes on with what it has opened
    assert sorted(os.listdir(folder.parent)) == ["wiki.jsonl", "wiki.jsonl.bm25"]


def test_the_folder_of_the_index_can_be_given_and_is_never_one_with_other_things(corpus, tmp_path):
    folder = tmp_path / "new" / "index"
    assert "Oslo" in ask(search(corpus=corpus, index=str(folder)), "Oslo")
    assert (folder / corpora.STAMP).is_file() and not Path(corpus + ".bm25").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="holds something else"):
        search(corpus=corpus, index=str(mine))
    with pytest.raises(UserError, match="cannot make search.index"):
        search(corpus=corpus, index=str(mine / "thesis.txt"))
    assert (mine / "thesis.txt").read_text() == "ten years of work"
    (folder / "meta.json").write_text("broken")
    with pytest.raises(UserError, match="is broken .*: remove it"):
        search(corpus=corpus, index=str(folder))


def test_where_nothing_can_be_written_the_index_goes_to_the_cache(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora.os, "access", lambda *_: False)  # root may write anywhere
    assert "Oslo" in ask(search(corpus=corpus), "Oslo")
    (folder,) = (tmp_path / "cache" / "nanotool").iterdir()
    assert folder.name.startswith("wiki.jsonl-") and not Path(corpus + ".bm25").exists()


def test_beside_an_index_that_is_read_only_the_cache_has_another_one(corpus, tmp_path, monkeypatch):
    """As on a cluster, where somebody else has made it; nothing is written into it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Index(corpus)
    folder = Path(corpus + ".bm25")
    before = sorted(os.listdir(folder))
    monkeypatch.setattr(corpora.os, "access", lambda *_: False)  # root may write anywhere
    assert "fjord" in texts(Index(corpus), "oslo", 1)[0]
    assert sorted(os.listdir(folder)) == before
    assert [path.name for path in (tmp_path / "cache/nanotool").iterdir()] != []


def test_several_programs_may_make_the_same_index_at_the_same_time(corpus, tmp_path):
    write(corpus, [{"text": f"passage number {i} of many"} for i in range(2000)])
    code = "import sys; from tools.retrieval.bm25 import Index; print(len(Index(sys.argv[1])))"
    argv = [sys.executable, "-c", code, corpus]
    running = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == [b"2000\n"] * 3
    assert sorted(os.listdir(tmp_path)) == ["wiki.jsonl", "wiki.jsonl.bm25"]


def test_a_task_has_its_corpus_in_memory():
    pytest.importorskip("tantivy")
    from tasks import facts

    tool = search(corpus="task:facts", k=1)
    rows = facts.corpus()
    assert len(tool.index) == len(rows)
    title, _, text = rows[3]["contents"].partition("\n")
    assert ask(tool, title) == f"Doc 1(Title: {title}) {text}"


def test_what_is_kept_of_a_task_is_that_of_its_rows(monkeypatch):
    """Pitfall 41: the task may have changed since."""
    pytest.importorskip("tantivy")
    from tasks import facts

    first, again = (search(corpus="task:facts").key for _ in range(2))
    monkeypatch.setattr(facts, "corpus", lambda: PASSAGES)
    assert first == again != search(corpus="task:facts").key


def test_a_packed_corpus_is_read_as_it_is(tmp_path):
    pytest.importorskip("tantivy")
    path = write(tmp_path / "wiki.jsonl.gz", PASSAGES, gzip.open)
    assert "Rome" in ask(search(corpus=path), "Italy")
    Path(path).write_bytes(Path(path).read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read .* after line"):
        search(corpus=path)


@pytest.mark.parametrize(
    "line, why",
    [
        ("{broken", "line 5: not JSON"),
        ("[1]", r"line 5: expected \{\"contents\""),
        ('{"body": "x"}', "line 5: .*its keys are body"),
        ('{"title": "x", "text": 3}', "line 5: expected"),
        ("\udcff", "line 5: not JSON"),
    ],
)
def test_a_wrong_line_of_the_corpus_is_named(corpus, line, why):
    with open(corpus, "a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=why):
        search(corpus=corpus)
    assert os.listdir(Path(corpus).parent) == ["wiki.jsonl"]  # and nothing is left behind


@pytest.mark.parametrize(
    "options, why",
    [
        ({}, "takes one of corpus, url and web, not none"),
        ({"corpus": "a", "web": "brave"}, "not corpus and web"),
        ({"corpus": "not there.jsonl"}, "cannot read search.corpus 'not there.jsonl'"),
        ({"corpus": "task:nothing"}, "there is no tasks/nothing.py"),
        ({"corpus": "task:facts", "index": "x"}, "search.index has no effect"),
        ({"url": "http://127.0.0.1/x", "index": "x"}, "search.index = 'x' has no effect"),
        ({"url": "http://127.0.0.1/x", "web_url": "y"}, "search.web_url = 'y' has no effect"),
        ({"url": "127.0.0.1:8000"}, "is no address: expected http"),
        ({"url": "http://127.0.0.1/x", "k": 0}, "search.k = 0"),
        ({"web": "serper"}, "needs a key: export SERPER_API_KEY="),
    ],
)
def test_options_that_cannot_work_are_refused_at_the_start(options, why, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(UserError, match=why):
        search(**options)


def test_an_empty_corpus_and_a_missing_package_are_said(corpus, monkeypatch):
    Path(corpus).write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        search(corpus=corpus)
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[search\]"'):
        search(corpus=corpus)


def test_many_threads_search_one_index(corpus):
    box = Toolbox([search], concurrency=8, options=(f"search.corpus={corpus}", "search.k=1"))
    words = ["Norway", "Italy", "cake", "passage"]

    async def calls():
        session = box.open({})
        asked = [{"query": f"{words[i % 4]} nr {i}"} for i in range(200)]
        return await asyncio.gather(*(session.call("search", one) for one in asked))

    for i, (content, error, _) in enumerate(asyncio.run(calls())):
        expected = PASSAGES[i % 4].get("title") or PASSAGES[i % 4].get("contents", "A passage")[:6]
        assert error is None and expected in content


# -- servers


@pytest.fixture
def server():
    """answers: (status, body) by turns; then .requests: (method, path, headers, body)."""

    class Server:
        requests, answers = [], []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Says nothing."""

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            body = json.loads(body) if body else None
            made.requests.append((self.command, self.path, dict(self.headers), body))
            status, body = made.answers.pop(0)
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

    made = Server()
    made.requests, made.answers = [], []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    made.url = f"http://127.0.0.1:{http.server_address[1]}/retrieve"
    yield made
    http.shutdown()
    http.server_close()


def test_a_search_r1_server_is_asked_as_search_r1_asks_it(server):
    document = {"id": "1", "contents": '"Rome"\nRome is the capital of Italy.'}
    server.answers = [
        (200, {"result": [[{"document": document, "score": 3.5}]]}),
        (200, {"result": [[document, {"title": "Oslo", "text": "in Norway"}]]}),  # without scores
        (200, {"result": [[]]}),
    ]
    tool = search(url=server.url, k=2)
    assert ask(tool, "Italy") == 'Doc 1(Title: "Rome") Rome is the capital of Italy.'
    method, path, _, body = server.requests[0]
    assert (method, path) == ("POST", "/retrieve")
    assert body == {"queries": ["Italy"], "topk": 2, "return_scores": True}
    assert ask(tool, "\ud800 Oslo").endswith("\nDoc 2(Title: Oslo) in Norway")
    assert ask(tool, "x") == "(nothing found for 'x')"


@pytest.mark.parametrize(
    "web, key, answer",
    [
        ("serper", "SERPER_API_KEY", {"organic": [{"title": "T", "link": "L", "snippet": "S"}]}),
        (
            "brave",
            "BRAVE_API_KEY",
            {"web": {"results": [{"title": "T", "url": "L", "description": "S"}]}},
        ),
        ("tavily", "TAVILY_API_KEY", {"results": [{"title": "T", "url": "L", "content": "S"}]}),
    ],
)
def test_a_web_search_api_is_asked_with_the_key(server, monkeypatch, web, key, answer):
    monkeypatch.setenv(key, "my-secret\r\n")  # as a file with CRLF gives it
    server.answers = [(200, answer), (200, {})]
    tool = search(web=web, web_url=server.url, k=4)
    assert ask(tool, "a & b") == "Doc 1(Title: T) S (L)"
    assert ask(tool, "none") == "(nothing found for 'none')"
    method, path, headers, body = server.requests[0]
    said = body or {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}
    assert said.get("q", said.get("query")) == "a & b" and "4" in str(said)
    sent = {name.lower(): value for name, value in headers.items()}
    assert method == ("GET" if web == "brave" else "POST")
    assert {
        "serper": sent.get("x-api-key"),
        "brave": sent.get("x-subscription-token"),
        "tavily": sent.get("authorization", "").removeprefix("Bearer "),
    }[web] == "my-secret"


@pytest.mark.parametrize(
    "status, body, kind, why",
    [
        (429, {}, NetworkError, "is busy .HTTP 429"),
        (503, b"<html>", NetworkError, "is busy .HTTP 503: <html>"),
        (401, {"error": "no such key"}, ToolError, "refuses the key .*no such key"),
        (422, {"detail": "topk"}, ToolError, "refuses the request .HTTP 422.*topk"),
        (200, b"<html>", ToolError, "makes no sense: <html>"),
        (200, {"results": 1}, ToolError, "makes no sense"),
        (200, {"result": [[{"document": {"id": "1"}}]]}, ToolError, "makes no sense"),
        (200, [1], ToolError, "makes no sense"),
    ],
)
def test_what_a_server_does_wrong_is_an_observation(server, status, body, kind, why):
    server.answers = [(status, body)]
    with pytest.raises(kind, match=why) as caught:
        ask(search(url=server.url), "x")
    assert caught.value.kind == "network"
    assert isinstance(caught.value, NetworkError) == (kind is NetworkError)


def test_a_server_that_is_not_there_is_tried_again_and_then_an_observation(server):
    """Pitfall 41: never a fake success."""
    server.answers = [(503, {}), (200, {"result": [[{"document": PASSAGES[0]}]]})]
    box = Toolbox([search], options=(f"search.url={server.url}",))

    async def calls(box, query):
        return await box.open({}).call("search", {"query": query})

    content, error, _ = asyncio.run(calls(box, "Oslo"))
    assert error is None and "Norway" in content and len(server.requests) == 2
    gone = Toolbox([search], options=("search.url=http://127.0.0.1:9/x", "search.retries=0"))
    content, error, _ = asyncio.run(calls(gone, "Oslo"))
    assert error == "network" and "the search server does not answer" in content
    assert gone.errors == {"network": 1}


def test_retries_are_refused_where_no_server_is_asked(corpus):
    """Pitfall 55: a corpus on this machine is not asked again."""
    with pytest.raises(UserError, match="search.retries has no effect: search asks no network"):
        Toolbox([search], options=(f"search.corpus={corpus}", "search.retries=3"))
