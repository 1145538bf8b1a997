"""The search tool: passages for a query, from one of three places.

    --tools=search --tool_options=search.corpus=wiki.jsonl,search.k=3  # BM25 on this machine
    --tool_options=search.url=http://127.0.0.1:8000/retrieve           # a server as Search-R1 has
    --tool_options=search.web=serper                                   # the web, by key

`corpus` is a JSONL file (or .jsonl.gz), one passage a line, as Search-R1 publishes them,
{"id": "7", "contents": "\\"title\\"\\ntext"}, or {"title": ..., "text": ...}; or `task:facts`, the
corpus of a generated task, kept in memory. It is indexed once, by tantivy (BM25 with k1 1.2, b
0.75; words lower-cased, without accents, stemmed as English), into the folder `index`, which holds
the passages too and is mapped, not loaded: a million passages take no memory of note. The folder
is made anew when size or time of the corpus have changed. Equal scores come in the order of the
corpus, so a query has the same result in every run.

What is not covered: languages without spaces (a run of letters is one word); phrases and operators
in the query, which is a bag of words, and in a large corpus those that most passages have do not
count; a web search changes from day to day, so a run with `web` cannot be repeated.
"""

import asyncio
import gzip
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Literal

from run.config import UserError
from tools import ToolError
from tools.calling.http import ToolClient, not_understood, plain

VERSION = 1  # of the index's form: an older one is made anew
STAMP = "nanotool-bm25.json"  # in the index: what corpus it was made from
HEAP = 256 * 2**20  # bytes that the indexer fills before it writes a part of the index
NOTABLE = 50 * 2**20  # bytes of a corpus that is indexed for so long that a line says so
MANY = 10_000  # passages; in so many, words of no interest slow a search
TIES = 50_000  # equal scores that are put in order; more take too long, and say nothing
TERMS = 64  # different words of a query that count; what a model repeats for ever is cut
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
        url: str = "",
        web: Literal["", "serper", "brave", "tavily"] = "",
        web_url: str = "",
        k: int = 3,
        chars: int = 1500,
    ):
        """corpus: a .jsonl file, or task:name. index: its folder, "" for <corpus>.bm25. url: of a
        /retrieve server. web: which search API, its key in SERPER_API_KEY, BRAVE_API_KEY or
        TAVILY_API_KEY. web_url: in place of the API's own. k: passages in a result. chars: at most,
        of a passage. UserError, also if the corpus cannot be indexed."""
        given = [name for name, value in (("corpus", corpus), ("url", url), ("web", web)) if value]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UserError(f"the search tool takes one of corpus, url and web, not {got}")
        if k < 1 or chars < 1:
            raise UserError(f"search.k = {k}, search.chars = {chars}: expected 1 or more")
        if index and not corpus:
            raise UserError(f"search.index = {index!r} has no effect without search.corpus")
        if web_url and not web:
            raise UserError(f"search.web_url = {web_url!r} has no effect without search.web")
        self.k, self.chars, self.url, self.web = k, chars, url, web
        self.key, self.network = "", not corpus
        if corpus:
            self.index = Index(corpus, index)
            self.key = self.index.made_from
            return
        if web:
            where, name = WEB[web]
            self.url, self.secret = web_url or where, os.environ.get(name, "").strip()
            if not self.secret:
                raise UserError(f"search.web = {web!r} needs a key: export {name}=...")
        self.server = ToolClient("the search server", self.url)

    async def __call__(self, query: str) -> str:
        """Search for passages about something.

        Args:
            query: What to look for, in a few words.
        """
        query = plain(query)
        if not query.strip():
            raise ToolError("bad_arguments", "error: the query is empty: say what to look for")
        if self.web:
            found = _web_passages(await self._ask(*_web_request(self, query)), self.web)
        elif self.url:
            body = {"queries": [query], "topk": self.k, "return_scores": True}
            found = _retrieved(await self._ask("POST", {"json": body}))
        else:  # in a thread: with a large corpus it takes many milliseconds
            found = await asyncio.to_thread(self.index.search, query, self.k)
        lines = [_shown(i, text, self.chars) for i, text in enumerate(found[: self.k], 1)]
        return "\n".join(lines) or f"(nothing found for {query.strip()[:100]!r})"

    async def _ask(self, method, request):
        return await self.server.fetch(method, **request)

    async def close(self) -> None:
        if self.network:
            await self.server.close()


def _shown(number, contents, chars):
    """A passage as Search-R1 shows it: the first line of `contents` is the title."""
    title, _, text = contents.strip().partition("\n")
    shown = f"Doc {number}(Title: {title}) {text}" if text else f"Doc {number} {title}"
    return shown if len(shown) <= chars else f"{shown[:chars]}…"


# -- the corpus on this machine


class Index:
    """BM25 over a corpus; made if it is not there. Any number of threads may search."""

    def __init__(self, corpus: str, folder: str = ""):
        tantivy = _tantivy()
        if corpus.startswith("task:"):
            if folder:
                raise UserError(f"search.index has no effect on {corpus}, kept in memory")
            rows = enumerate(_of_task(corpus.removeprefix("task:")), 1)
            passages = [_contents(row, f"{corpus}, row {n}") for n, row in rows]
            self.made_from = hashlib.blake2b(repr(passages).encode(), digest_size=12).hexdigest()
            index = _open(tantivy)
            _fill(tantivy, index, passages)
        else:
            path = _on_disk(tantivy, corpus, folder)
            self.made_from = str(_stamp(path))  # kept results are those of this very corpus
            self.links = None if os.access(path, os.W_OK) else _linked(path)
            try:
                index = _open(tantivy, self.links.name if self.links else path)
            except ValueError as error:
                raise UserError(f"the index '{path}' is broken ({error}): remove it") from None
        self.tantivy = tantivy
        self.schema, self.analyzer = _schema(tantivy), _analyzer(tantivy)
        index.config_reader("manual", 0)  # the folder does not change: no thread that watches it
        index.reload()
        self.searcher = index.searcher()

    def __len__(self) -> int:
        return self.searcher.num_docs

    def search(self, query: str, k: int) -> list[str]:
        """The k best passages, each "title\\ntext", the best first."""
        term, should = self.tantivy.Query.term_query, self.tantivy.Occur.Should
        words = self._telling(list(dict.fromkeys(self.analyzer.analyze(query)))[:TERMS])
        if not words:
            return []
        parts = [(should, term(self.schema, "contents", word, "freq")) for word in words]
        asked = self.tantivy.Query.boolean_query(parts)
        limit = k + 8
        while True:  # until nothing beyond the limit ties with what is within k
            hits = self.searcher.search(asked, limit, count=False).hits
            # rounded: the same words, added up in another order, differ in the last bits
            scores = [float(f"{score:.5g}") for score, _ in hits]
            if len(hits) < limit or scores[-1] < scores[k - 1] or limit > TIES:
                break
            limit *= 4
        places = [place for _, place in hits]
        numbers = self.searcher.fast_field_values("number", places)
        order = sorted(range(len(hits)), key=lambda i: (-scores[i], numbers[i]))
        return [self.searcher.doc(places[i]).get_first("contents") for i in order[:k]]

    def _telling(self, words):
        """Without the words that most passages have ("the", "of"), unless there are no others:
        they hardly change the order, and take most of the time."""
        total = len(self)
        if total < MANY:
            return words
        rare = [word for word in words if 0 < self.searcher.doc_freq("contents", word) < total / 2]
        return rare or words


def _tantivy():
    try:
        import tantivy
    except ImportError:
        raise UserError('search.corpus needs tantivy: pip install -e ".[search]"') from None
    return tantivy


def _schema(tantivy):
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("contents", stored=True, tokenizer_name="words", index_option="freq")
    builder.add_integer_field("number", fast=True)  # of the line: orders equal scores
    return builder.build()


def _analyzer(tantivy):
    filters = tantivy.Filter
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for one in filters.remove_long(40), filters.lowercase(), filters.ascii_fold():
        builder = builder.filter(one)
    return builder.filter(filters.stemmer("english")).build()


def _open(tantivy, path=None):
    """An index in a folder, new if that is empty, or in memory."""
    index = tantivy.Index(_schema(tantivy), path=path and str(path))
    index.register_tokenizer("words", _analyzer(tantivy))
    return index


def _linked(path):
    """A folder of links to an index that is read-only: tantivy makes a lock beside what it opens.
    It goes when the Index goes."""
    links = tempfile.TemporaryDirectory(prefix="nanotool-bm25-")
    for file in path.resolve().iterdir():
        if file.suffix != ".lock":
            Path(links.name, file.name).symlink_to(file)
    return links


def _fill(tantivy, index, passages):
    """Adds all passages (texts); returns how many. One thread: the same parts in every run."""
    writer, count = index.writer(HEAP, 1), 0
    try:
        for count, text in enumerate(passages, 1):
            writer.add_document(tantivy.Document(contents=text, number=count))
        writer.commit()
        writer.wait_merging_threads()
    except BaseException:  # Ctrl-C too: its threads still write, and the folder is to be removed
        with suppress(ValueError):
            writer.rollback()
            writer.wait_merging_threads()
        raise
    return count


def _of_task(name):
    try:
        return importlib.import_module(f"tasks.{name}").corpus()
    except ModuleNotFoundError as error:
        if error.name != f"tasks.{name}":
            raise
        raise UserError(f"search.corpus = 'task:{name}': there is no tasks/{name}.py") from None


def _on_disk(tantivy, corpus, folder):
    """The folder of an index that fits the corpus, made if there is none."""
    corpus = Path(corpus)
    try:
        facts = corpus.stat()
    except OSError as error:
        raise UserError(f"cannot read search.corpus '{corpus}' ({error.strerror})") from None
    stamp = {"version": VERSION, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    path = Path(folder) if folder else _place(corpus, stamp)
    if _fits(path, stamp):
        return path
    try:
        if path.exists() and _stamp(path) is None and any(path.iterdir()):
            raise UserError(f"search.index '{path}' holds something else: give a folder of its own")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{path.name}.aside-", dir=path.parent))
        aside.chmod(0o755)  # mkdtemp's is for its user alone; others may share the corpus
    except OSError as error:
        raise UserError(f"cannot make search.index '{path}' ({error.strerror})") from None
    if facts.st_size > NOTABLE:
        print(f"search: indexing {corpus} into {path}, once", file=sys.stderr, flush=True)
    try:  # aside: it is whole or not there, and two runs may make it at the same time
        try:
            passages = _fill(tantivy, _open(tantivy, aside), _passages(corpus))
        except ValueError as error:  # how tantivy says that a disk is full
            raise UserError(f"cannot make search.index '{path}' ({error})") from None
        if not passages:
            raise UserError(f"search.corpus '{corpus}' is empty")
        (aside / STAMP).write_text(json.dumps(stamp | {"passages": passages}))
        for file in aside.iterdir():
            file.chmod(0o644)  # tantivy's meta.json is for its user alone
        _put(aside, path, stamp)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _put(aside, path, stamp):
    """Renames the new index to `path`, unless another run has put one there meanwhile."""
    for _ in range(10):
        if _fits(path, stamp):
            return
        with suppress(OSError):  # there is one of the corpus as it was before
            aside.rename(path)
            return
        old = tempfile.mkdtemp(prefix=f"{path.name}.aside-", dir=path.parent)
        with suppress(OSError):  # another run has just done it
            path.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    raise UserError(f"cannot put the new index at '{path}': remove what is there")


def _place(corpus, stamp):
    """Beside the corpus; in the user's cache if nothing is there that fits, or can be written."""
    beside = corpus.with_name(f"{corpus.name}.bm25")
    if _fits(beside, stamp) or os.access(corpus.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.blake2b(str(corpus.resolve()).encode(), digest_size=6).hexdigest()
    return cache / "nanotool" / f"{corpus.name}-{digest}.bm25"


def _fits(path, stamp):
    found = _stamp(path) or {}
    return {key: found.get(key) for key in stamp} == stamp


def _stamp(path):
    """What the index in a folder was made from; None if there is none."""
    try:
        found = json.loads((path / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _passages(path):
    """The passages of a JSONL file, each "title\\ntext"; UserError with the line that is wrong."""
    opened = gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")
    number = 0
    try:
        with opened as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _contents(json.loads(line), f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} after line {number}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None


def _contents(row, where):
    wanted = 'expected {"contents": "title\\ntext"} or {"title": ..., "text": ...}'
    if not isinstance(row, dict):
        raise UserError(f"{where}: {wanted}, not {str(row)[:80]}")
    if isinstance(row.get("contents"), str):
        return plain(row["contents"])
    title, text = row.get("title") or "", row.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{where}: {wanted}; its keys are {', '.join(row)}")
    return plain(f"{title}\n{text}" if title else text)


# -- servers


def _retrieved(answer):
    """The passages in the answer of a /retrieve server."""
    try:
        found = [one.get("document", one) for one in answer["result"][0]]
        return [_contents(one, "a passage of the server") for one in found]
    except (KeyError, IndexError, TypeError, AttributeError, UserError):
        raise not_understood("the search server", json.dumps(answer)) from None


def _web_request(tool, query):
    """-> method, arguments of the request to the API that `tool` uses."""
    if tool.web == "serper":
        return "POST", {"json": {"q": query, "num": tool.k}, "headers": {"X-API-KEY": tool.secret}}
    if tool.web == "brave":
        headers = {"X-Subscription-Token": tool.secret, "Accept": "application/json"}
        return "GET", {"params": {"q": query, "count": tool.k}, "headers": headers}
    headers = {"Authorization": f"Bearer {tool.secret}"}
    return "POST", {"json": {"query": query, "max_results": tool.k}, "headers": headers}


def _web_passages(answer, web):
    """The results in the API's answer, each "title\\nsnippet (address)"."""
    try:
        if web == "serper":
            found, keys = answer.get("organic"), ("title", "snippet", "link")
        elif web == "brave":
            found, keys = (answer.get("web") or {}).get("results"), ("title", "description", "url")
        else:
            found, keys = answer.get("results"), ("title", "content", "url")
        parts = [[" ".join(str(one.get(key) or "").split()) for key in keys] for one in found or []]
    except (AttributeError, TypeError):
        raise not_understood("the search server", json.dumps(answer)) from None
    return [f"{title or link}\n{text} ({link})" for title, text, link in parts]
