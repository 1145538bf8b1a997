"""A /retrieve server as Search-R1 has it: passages of one corpus, for many runs at once.

    python -m serve.retrieve --corpus=wiki.jsonl
    python -m serve.retrieve --corpus=wiki.jsonl --dense=minishlab/potion-retrieval-32M --port=8001
    --tools=search --tool_options=search.url=http://127.0.0.1:8000/retrieve  # in a training run

    POST /retrieve  {"queries": ["who wrote hamlet"], "topk": 3, "return_scores": true}
        -> {"result": [[{"document": {"id": "7", "contents": "title\\ntext"}, "score": 9.1}, ...]]}
    GET /health     {"status": "healthy", "passages": 100000, ...}
    GET /metrics    the same numbers for Prometheus

A list of passages for each query, the best first. Without topk it is that of --topk; without
return_scores a passage is the document alone. Search-R1's clients work unchanged, and so does our
search tool, which asks again when the server is away or busy. The index is that of the search tool
(tools/search.py), in the same folder. Queries that come while others are searched wait, and are
then searched together: a dense index is read once for all of them.

What is covered: only this machine is served, and no web page (DNS rebinding), unless --host and a
token say otherwise; requests that do not come to their end (web.REQUEST_SECONDS), that are too
large or ask for too much (MOST_...), more than can wait (503: come again), and more than --timeout
seconds. A wrong request is answered by a sentence, with status 4xx. What is not: TLS (put a proxy
in front); two processes for one corpus: start two servers. What is searched is not stopped: after
--timeout its client is told, and the thread goes on. In a dense index equal passages may change
places from batch to batch.
"""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field

from run import config
from run.config import UserError

if __name__ == "__main__":
    config.answer_help(__file__)

from run.http import key_from
from tools.search import open_index

try:
    from serve import web
    from serve.web import Refused
except ImportError as error:
    raise UserError(
        f'serve.retrieve needs a package ({error}): pip install -e ".[search]"'
    ) from None

MOST_BYTES = 4 * 2**20  # of a request
MOST_QUERIES = 512  # of a request
MOST_TOPK = 100
MOST_CHARS = 10_000  # of a query
TOGETHER = 64  # queries that are searched at once


@dataclass
class Config:
    corpus: str = ""  # a .jsonl(.gz) file of passages, or task:facts
    index: str = ""  # its folder; "" = beside the corpus
    dense: str = ""  # a model for dense retrieval, by folder or name; "" = BM25
    hybrid: bool = False  # the order of BM25 and of the dense model together
    rerank: str = ""  # a cross-encoder that puts the best in order, by folder or name; "" = none
    query_prefix: str = ""  # in front of a query, for a dense model that wants one: "query: "
    passage_prefix: str = ""  # in front of a passage: "passage: "
    topk: int = 3  # passages for a query, where a request does not say
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too: needs a token
    port: int = 8000  # 0 = any free one; it is printed
    token_env: str = "NANOTOOL_TOKEN"  # the environment variable that holds the bearer token
    timeout: float = 30.0  # seconds that a request may wait for its passages
    most_waiting: int = 1024  # requests that may wait; the others are told to come again


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if not cfg.corpus:
        raise UserError("corpus = '': expected a file of passages: --corpus=wiki.jsonl")
    config.require_positive(cfg, "topk timeout most_waiting")
    if cfg.topk > MOST_TOPK:
        raise UserError(f"topk = {cfg.topk}: expected at most {MOST_TOPK}")
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 0 to 65535")
    web.require_token(cfg.host, cfg.token_env)


# -- what a request may be


@dataclass
class Question:
    """A request that is in order."""

    queries: list[str]
    topk: int
    with_scores: bool
    results: asyncio.Future = field(default_factory=asyncio.Future)  # a list of Passages for each


def read_question(body: bytes, default_topk: int) -> Question:
    """Reads what a request asks for. Raises Refused."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is no JSON ({error})") from None
    if not isinstance(given, dict) or "queries" not in given:
        raise Refused(422, 'expected {"queries": ["..."], "topk": 3, "return_scores": true}')

    queries = given["queries"]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise Refused(422, "queries: expected a list of texts")
    if len(queries) > MOST_QUERIES:
        raise Refused(422, f"queries: expected at most {MOST_QUERIES}, not {len(queries)}")
    longest = max(map(len, queries), default=0)
    if longest > MOST_CHARS:
        raise Refused(422, f"queries: expected at most {MOST_CHARS} characters, not {longest}")

    topk = given.get("topk") or default_topk  # 0 and null are none, as to Search-R1
    if type(topk) is not int or not 1 <= topk <= MOST_TOPK:
        shown = json.dumps(given["topk"])[:80]
        raise Refused(422, f"topk: expected a whole number from 1 to {MOST_TOPK}, not {shown}")

    with_scores = given.get("return_scores", False)
    if not isinstance(with_scores, bool | None):
        raise Refused(422, "return_scores: expected true or false")
    # half a character, which JSON can spell, is in no passage, and no encoder takes it
    queries = [query.encode("utf-8", "replace").decode() for query in queries]
    return Question(queries, topk, bool(with_scores))


# -- searching


@dataclass
class Metrics:
    """What a server did so far; /health and /metrics tell it."""

    passages: int = 0
    requests: int = 0  # to /retrieve that were answered with passages
    queries: int = 0  # of them
    refused: int = 0  # requests with a status of 4xx
    busy: int = 0  # with 503: too many waited, or for too long
    failed: int = 0  # with 500
    seconds: float = 0.0  # that answered requests took, together
    searching_seconds: float = 0.0  # that the index was busy
    waiting: int = 0  # requests, at this moment


COUNTERS = "requests queries refused busy failed seconds searching_seconds".split()


class Retriever:
    """Searches the index for whoever asks: what waits is searched together, in a thread."""

    def __init__(self, index, cfg: Config):
        self.index = index
        self.cfg = cfg
        self.metrics = Metrics(passages=len(index))
        self._waiting = asyncio.Queue()

    async def retrieve(self, body: bytes) -> dict:
        """Answers a request. Raises Refused."""
        start = time.perf_counter()
        question = read_question(body, self.cfg.topk)
        if self.metrics.waiting >= self.cfg.most_waiting:
            raise Refused(503, f"{self.cfg.most_waiting} requests wait already: come again")
        self.metrics.waiting += 1
        try:
            self._waiting.put_nowait(question)
            results = await asyncio.wait_for(question.results, self.cfg.timeout)
        except TimeoutError:
            raise Refused(503, f"it took longer than {self.cfg.timeout:g} s") from None
        finally:
            self.metrics.waiting -= 1
        self.metrics.requests += 1
        self.metrics.queries += len(question.queries)
        self.metrics.seconds += time.perf_counter() - start
        return {"result": [_shown(passages, question) for passages in results]}

    async def work(self) -> None:
        """Searches for those who wait, until this is cancelled."""
        while True:
            # 1. the first who waits, and those behind who fit
            questions = [await self._waiting.get()]
            size = len(questions[0].queries)
            while size < TOGETHER and not self._waiting.empty():
                questions.append(self._waiting.get_nowait())
                size += len(questions[-1].queries)
            questions = [question for question in questions if not question.results.done()]

            # 2. search for all of them
            start = time.perf_counter()
            try:
                results = await asyncio.to_thread(self._search, questions)
            except Exception as error:  # of the index: who asked is told, and the server goes on
                for question in questions:
                    if not question.results.done():
                        question.results.set_exception(error)
                continue
            finally:
                self.metrics.searching_seconds += time.perf_counter() - start

            # 3. to each its own
            for question, found in zip(questions, results, strict=True):
                if not question.results.done():  # who waited for too long has gone
                    question.results.set_result(found)

    def _search(self, questions):
        """Finds a list of results for each question."""
        queries = []
        most = 1
        for question in questions:
            queries += question.queries
            most = max(most, question.topk)
        found = iter(self.index.find(queries, most) if queries else [])
        results = []
        for question in questions:
            results.append([next(found)[: question.topk] for _ in question.queries])
        return results


def _shown(passages, question):
    """Writes what a query found as Search-R1 sends it."""
    documents = [{"id": passage.id, "contents": passage.contents} for passage in passages]
    if not question.with_scores:
        return documents
    shown = []
    for passage, document in zip(passages, documents, strict=True):
        shown.append({"document": document, "score": passage.score})
    return shown


# -- HTTP

METHODS = {"/retrieve": "POST", "/health": "GET", "/metrics": "GET"}


def application(cfg: Config, index):
    """Makes the ASGI application. Its event loop begins with its lifespan."""
    token = key_from(cfg.token_env)
    retriever = None
    working = None

    async def app(scope, receive, send):
        nonlocal retriever, working
        if scope["type"] == "lifespan":
            retriever = Retriever(index, cfg)
            working = asyncio.create_task(retriever.work())
            await web.live(receive, send)
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
            return
        if scope["type"] != "http":  # a web socket: uvicorn refuses it
            return
        if not web.has_token(scope["headers"], token):
            await web.refuse_token(send)
            return
        try:
            await answer(scope, receive, send)
        except Refused as refused:
            headers = []
            if refused.status == 503:
                retriever.metrics.busy += 1
                headers = [(b"retry-after", b"1")]
            else:
                retriever.metrics.refused += 1
            await web.answer(send, refused.status, {"error": refused.why}, headers)
        except Exception as error:  # of the index
            retriever.metrics.failed += 1
            why = f"{type(error).__name__}: {error}"[:300]
            await web.answer(send, 500, {"error": why})

    async def answer(scope, receive, send):
        # 1. is it for us?
        path = scope["path"]
        if web.is_loopback(cfg.host) and not web.names_loopback(scope["headers"]):
            raise Refused(421, "this server is for this machine: ask for http://127.0.0.1")
        if path not in METHODS:
            raise Refused(404, f"there is no {path[:80]}; there are {', '.join(METHODS)}")
        if scope["method"] != METHODS[path]:
            raise Refused(405, f"{path} is asked by {METHODS[path]}, not {scope['method'][:20]}")

        # 2. answer it
        if path == "/health":
            await web.answer(send, 200, {"status": "healthy", **vars(retriever.metrics)})
        elif path == "/metrics":
            text = web.prometheus("nanotool_retrieve", retriever.metrics, COUNTERS)
            await web.answer(send, 200, text)
        else:
            body = await web.read_body(scope, receive, MOST_BYTES)
            await web.answer(send, 200, await retriever.retrieve(body))

    return app


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    index = open_index(
        cfg.corpus,
        index=cfg.index,
        dense=cfg.dense,
        hybrid=cfg.hybrid,
        rerank=cfg.rerank,
        query_prefix=cfg.query_prefix,
        passage_prefix=cfg.passage_prefix,
    )
    listening = web.listen(cfg.host, cfg.port)
    print(f"serving {len(index)} passages at {web.address(listening)}/retrieve", flush=True)
    web.serve(application(cfg, index), listening)


if __name__ == "__main__":
    config.main(main)
