"""The search tool: passages for a query, from one of three places.

    --tools=search --tool_options=search.corpus=wiki.jsonl,search.k=3  # BM25 on this machine
    --tool_options=search.corpus=wiki.jsonl,search.dense=minishlab/potion-retrieval-32M
    --tool_options=search.url=http://127.0.0.1:8000/retrieve           # a server as Search-R1 has
    --tool_options=search.web=serper                                   # the web, by key

`corpus` is a JSONL file (or .jsonl.gz), one passage a line, as Search-R1 publishes them,
{"id": "7", "contents": "\\"title\\"\\ntext"}, or {"title": ..., "text": ...}; or `task:facts`, the
corpus of a generated task, kept in memory. It is indexed once, for BM25 (tools/retrieval/bm25.py)
or by a model (dense.py), into the folder `index`. That lies beside the corpus, or in the user's
cache where nothing can be written there, and is made anew when size or time of the corpus have
changed. `python -m serve.retrieve` serves the same indexes to many runs.

What is not covered: languages without spaces (to BM25 a run of letters is one word); phrases and
operators in the query, which is a bag of words, and in a large corpus those that most passages have
do not count; a web search changes from day to day, so a run with `web` cannot be repeated.
"""

import asyncio
import json
import os
from typing import Literal

from run.config import UserError
from run.http import bearer, key_from
from tools import ToolError
from tools.calling.http import ToolClient, not_understood, plain
from tools.retrieval import bm25
from tools.retrieval.corpus import of_row

WEB = {  # where, the key's environment variable
    "serper": ("https://google.serper.dev/search", "SERPER_API_KEY"),
    "brave": ("https://api.search.brave.com/res/v1/web/search", "BRAVE_API_KEY"),
    "tavily": ("https://api.tavily.com/search", "TAVILY_API_KEY"),
}


class search:
    shared = True  # one index, one set of options, for all trajectories
    pure = True
    network = True

    def __init__(
        self,
        corpus: str = "",
        index: str = "",
        dense: str = "",
        hybrid: bool = False,
        rerank: str = "",
        query_prefix: str = "",
        passage_prefix: str = "",
        url: str = "",
        token_env: str = "",
        web: Literal["", "serper", "brave", "tavily"] = "",
        web_url: str = "",
        k: int = 3,
        chars: int = 1500,
    ):
        """corpus: a .jsonl file, or task:name. index, dense, hybrid, rerank, query_prefix,
        passage_prefix: as open_index() says. url: of a /retrieve server. token_env: the environment
        variable with the token that this server wants, "" for none. web: which search API, its key
        in SERPER_API_KEY, BRAVE_API_KEY or TAVILY_API_KEY. web_url: in place of the API's own. k:
        passages in a result. chars: at most, of a passage. UserError, also if the corpus cannot be
        indexed."""
        sources = {"corpus": corpus, "url": url, "web": web}
        named = [name for name, value in sources.items() if value]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise UserError(f"the search tool takes one of corpus, url and web, not {got}")
        if token_env and not url:
            raise UserError(f"search.token_env = {token_env!r} has no effect without search.url")
        if k < 1 or chars < 1:
            raise UserError(f"search.k = {k}, search.chars = {chars}: expected 1 or more")
        of_corpus = {
            "index": index,
            "dense": dense,
            "hybrid": hybrid,
            "rerank": rerank,
            "query_prefix": query_prefix,
            "passage_prefix": passage_prefix,
        }
        for name, value in of_corpus.items():
            if value and not corpus:
                raise UserError(f"search.{name} = {value!r} has no effect without search.corpus")
        if web_url and not web:
            raise UserError(f"search.web_url = {web_url!r} has no effect without search.web")
        self.k = k
        self.chars = chars
        self.web = web
        self.network = not corpus
        if corpus:
            self.index = open_index(corpus, **of_corpus)
            self.key = self.index.made_from  # kept results are of this corpus (Toolbox)
            return
        self.index = None
        self.key = ""
        self.url = url
        if web:
            api_url, key_name = WEB[web]
            self.url = web_url or api_url
            self.secret = os.environ.get(key_name, "").strip()
            if not self.secret:
                raise UserError(f"search.web = {web!r} needs a key: export {key_name}=...")
        self.server = ToolClient("the search server", self.url)
        self.headers = {}  # to a /retrieve server
        if token_env:
            token = key_from(token_env)
            if not token:
                raise UserError(f"search.token_env: {token_env} is not set: export {token_env}=...")
            self.headers = bearer(token)

    async def __call__(self, query: str) -> str:
        """Search for passages about something.

        Args:
            query: What to look for, in a few words.
        """
        query = plain(query)
        if not query.strip():
            raise ToolError("bad_arguments", "error: the query is empty: say what to look for")
        if self.index:  # in a thread: with a large corpus it takes many milliseconds
            (found,) = await asyncio.to_thread(self.index.find, [query], self.k)
            passages = [passage.contents for passage in found]
        elif self.web:
            method, request = _web_request(self.web, self.secret, query, self.k)
            passages = _web_passages(self.web, await self._ask(method, request))
        else:
            body = {"queries": [query], "topk": self.k, "return_scores": True}
            passages = _retrieved(await self._ask("POST", {"json": body, "headers": self.headers}))
        lines = []
        for number, passage in enumerate(passages[: self.k], 1):
            lines.append(_shown(number, passage, self.chars))
        return "\n".join(lines) or f"(nothing found for {query.strip()[:100]!r})"

    async def _ask(self, method, request):
        return await self.server.fetch(method, **request)

    async def close(self) -> None:
        if self.network:
            await self.server.close()


def open_index(
    corpus: str,
    index: str = "",
    dense: str = "",
    hybrid: bool = False,
    rerank: str = "",
    query_prefix: str = "",
    passage_prefix: str = "",
):
    """Opens an index of the corpus, with find(queries, k); makes it if it is not there.

    corpus: a .jsonl file, or task:name. index: its folder, "" for one beside the corpus. dense: a
    model, by folder or name; "" for BM25. hybrid: the order of both together. rerank: a
    cross-encoder, by folder or name, that looks at the best again. query_prefix, passage_prefix: in
    front of what the dense model reads. UserError.
    """
    if not dense and (hybrid or query_prefix or passage_prefix):
        keys = "hybrid, query_prefix and passage_prefix"
        raise UserError(f"{keys} have no effect without dense: drop them, or name a model")
    if hybrid and index:
        raise UserError("hybrid makes two indexes, beside the corpus: drop index")
    if dense:
        from tools.retrieval import dense as dense_retrieval

        opened = dense_retrieval.Index(corpus, dense, index, query_prefix, passage_prefix)
        if hybrid:
            opened = dense_retrieval.Hybrid(bm25.Index(corpus), opened)
    else:
        opened = bm25.Index(corpus, index)
    if rerank:
        from tools.retrieval.dense import Reranked

        opened = Reranked(opened, rerank)
    return opened


def _shown(number, contents, chars):
    """Writes a passage as Search-R1 shows it: the first line of `contents` is the title."""
    title, _, text = contents.strip().partition("\n")
    shown = f"Doc {number}(Title: {title}) {text}" if text else f"Doc {number} {title}"
    return shown if len(shown) <= chars else f"{shown[:chars]}…"


# -- servers


def _retrieved(answer):
    """Reads the passages in the answer of a /retrieve server."""
    try:
        rows = [hit.get("document", hit) for hit in answer["result"][0]]
        return [of_row(row, "a passage of the server").contents for row in rows]
    except (KeyError, IndexError, TypeError, AttributeError, UserError):
        raise not_understood("the search server", json.dumps(answer)) from None


def _web_request(web, secret, query, k):
    """Writes the request to that API. -> its method, its arguments"""
    if web == "serper":
        return "POST", {"json": {"q": query, "num": k}, "headers": {"X-API-KEY": secret}}
    if web == "brave":
        headers = {"X-Subscription-Token": secret, "Accept": "application/json"}
        return "GET", {"params": {"q": query, "count": k}, "headers": headers}
    headers = {"Authorization": f"Bearer {secret}"}
    return "POST", {"json": {"query": query, "max_results": k}, "headers": headers}


def _web_passages(web, answer):
    """Reads the results in that API's answer, each "title\\nsnippet (address)"."""
    try:
        if web == "serper":
            hits = answer.get("organic")
            keys = ("title", "snippet", "link")
        elif web == "brave":
            hits = (answer.get("web") or {}).get("results")
            keys = ("title", "description", "url")
        else:
            hits = answer.get("results")
            keys = ("title", "content", "url")
        passages = []
        for hit in hits or []:
            title, text, link = [_one_line(hit.get(key)) for key in keys]
            passages.append(f"{title or link}\n{text} ({link})")
        return passages
    except (AttributeError, TypeError):
        raise not_understood("the search server", json.dumps(answer)) from None


def _one_line(value):
    return " ".join(str(value or "").split())
