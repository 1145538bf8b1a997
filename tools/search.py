"""The search tool: passages for a query, from one of three places.

    --tools=search --tool_options=search.corpus=wiki.jsonl,search.k=3  # BM25 on this machine
    --tool_options=search.url=http://127.0.0.1:8000/retrieve           # a server as Search-R1 has
    --tool_options=search.web=serper                                   # the web, by key

`corpus` is a JSONL file (or .jsonl.gz), one passage a line, as Search-R1 publishes them,
{"id": "7", "contents": "\\"title\\"\\ntext"}, or {"title": ..., "text": ...}; or `task:facts`, the
corpus of a generated task, kept in memory. It is indexed once, by tantivy (BM25 with k1 1.2, b
0.75; words lower-cased, without accents, stemmed as English), into the folder `index`, which holds
the passages too and is mapped, not loaded: a million passages take no memory of note. It lies
beside the corpus, or in the user's cache where nothing can be written there, and is made anew when
size or time of the corpus have changed. Equal scores come in the order of the corpus, so a query
has the same result in every run.

What is not covered: languages without spaces (a run of letters is one word); phrases and operators
in the query, which is a bag of words, and in a large corpus those that most passages have do not
count; a web search changes from day to day, so a run with `web` cannot be repeated.
"""

import asyncio
import fcntl
import gzip
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from run.config import UserError, tell
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
        sources = {"corpus": corpus, "url": url, "web": web}
        named = [name for name, value in sources.items() if value]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise UserError(f"the search tool takes one of corpus, url and web, not {got}")
        if k < 1 or chars < 1:
            raise UserError(f"search.k = {k}, search.chars = {chars}: expected 1 or more")
        if index and not corpus:
            raise UserError(f"search.index = {index!r} has no effect without search.corpus")
        if web_url and not web:
            raise UserError(f"search.web_url = {web_url!r} has no effect without search.web")
        self.k = k
        self.chars = chars
        self.web = web
        self.network = not corpus
        if corpus:
            self.index = Index(corpus, index)
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

    async def __call__(self, query: str) -> str:
        """Search for passages about something.

        Args:
            query: What to look for, in a few words.
        """
        query = plain(query)
        if not query.strip():
            raise ToolError("bad_arguments", "error: the query is empty: say what to look for")
        if self.index:  # in a thread: with a large corpus it takes many milliseconds
            passages = await asyncio.to_thread(self.index.search, query, self.k)
        elif self.web:
            method, request = _web_request(self.web, self.secret, query, self.k)
            passages = _web_passages(self.web, await self._ask(method, request))
        else:
            body = {"queries": [query], "topk": self.k, "return_scores": True}
            passages = _retrieved(await self._ask("POST", {"json": body}))
        lines = []
        for number, passage in enumerate(passages[: self.k], 1):
            lines.append(_shown(number, passage, self.chars))
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
            passages = _passages_of_task(corpus)
            self.made_from = hashlib.blake2b(repr(passages).encode(), digest_size=12).hexdigest()
            index = _open(tantivy)
            _fill(tantivy, index, passages)
        else:
            path = _on_disk(tantivy, Path(corpus), folder)
            self.made_from = str(_stamp(path))  # kept results are those of this very corpus
            try:
                index = _open(tantivy, path)
            except ValueError as error:
                remedy = "remove it"
                if not os.access(path, os.W_OK):
                    remedy = "tantivy makes a lock in it, so give one that can be written"
                raise UserError(f"the index '{path}' is broken ({error}): {remedy}") from None
        self.tantivy = tantivy
        self.schema = _schema(tantivy)
        self.analyzer = _analyzer(tantivy)
        index.config_reader("manual", 0)  # the folder does not change: no thread that watches it
        index.reload()
        self.searcher = index.searcher()

    def __len__(self) -> int:
        return self.searcher.num_docs

    def search(self, query: str, k: int) -> list[str]:
        """The k best passages, each "title\\ntext", the best first."""
        different_words = list(dict.fromkeys(self.analyzer.analyze(query)))
        words = self._telling(different_words[:TERMS])
        if not words:
            return []
        query_of = self.tantivy.Query
        should = self.tantivy.Occur.Should
        terms = [query_of.term_query(self.schema, "contents", word, "freq") for word in words]
        any_of_them = query_of.boolean_query([(should, term) for term in terms])
        limit = k + 8
        while True:  # until nothing beyond the limit ties with what is within k
            hits = self.searcher.search(any_of_them, limit, count=False).hits
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
    builder = builder.filter(filters.remove_long(40))
    builder = builder.filter(filters.lowercase())
    builder = builder.filter(filters.ascii_fold())
    builder = builder.filter(filters.stemmer("english"))
    return builder.build()


def _open(tantivy, path=None):
    """An index in a folder, new if that is empty, or in memory."""
    index = tantivy.Index(_schema(tantivy), path=path and str(path))
    index.register_tokenizer("words", _analyzer(tantivy))
    return index


def _fill(tantivy, index, passages):
    """Adds all passages (texts); returns how many. One thread: the same parts in every run."""
    writer = index.writer(HEAP, 1)
    count = 0
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


def _passages_of_task(corpus):
    name = corpus.removeprefix("task:")
    try:
        rows = importlib.import_module(f"tasks.{name}").corpus()
    except ModuleNotFoundError as error:
        if error.name != f"tasks.{name}":
            raise
        raise UserError(f"search.corpus = '{corpus}': there is no tasks/{name}.py") from None
    return [_contents(row, f"{corpus}, row {number}") for number, row in enumerate(rows, 1)]


# -- the index on disk


def _on_disk(tantivy, corpus, folder):
    """The folder of an index that fits the corpus, made if there is none."""
    try:
        facts = corpus.stat()
    except OSError as error:
        raise UserError(f"cannot read search.corpus '{corpus}' ({error.strerror})") from None
    stamp = {"version": VERSION, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    path = Path(folder) if folder else _place(corpus)
    if _fits(path, stamp):
        return path
    try:
        if path.exists() and _stamp(path) is None and any(path.iterdir()):
            raise UserError(f"search.index '{path}' holds something else: give a folder of its own")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            if not _fits(path, stamp):  # another run may just have made it
                _make(tantivy, corpus, path, stamp)
    except OSError as error:
        raise UserError(f"cannot make search.index '{path}' ({error.strerror or error})") from None
    return path


def _place(corpus):
    """Beside the corpus; in the user's cache if nothing can be written there."""
    beside = corpus.with_name(f"{corpus.name}.bm25")
    # tantivy makes a lock in what it opens: the index itself has to be writable too
    if os.access(beside if beside.exists() else corpus.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.blake2b(str(corpus.resolve()).encode(), digest_size=6).hexdigest()
    return cache / "nanotool" / f"{corpus.name}-{digest}.bm25"


@contextmanager
def _locked(folder):
    """Of several runs that begin at the same time one makes the index, and the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(tantivy, corpus, path, stamp):
    """Indexes the corpus into `path`: aside first, so that it is whole or not there."""
    if stamp["size"] > NOTABLE:
        tell(f"search: indexing {corpus} into {path}, once")
    aside = Path(tempfile.mkdtemp(prefix=f"{path.name}.aside-", dir=path.parent))
    try:
        try:
            count = _fill(tantivy, _open(tantivy, aside), _passages(corpus))
        except ValueError as error:  # how tantivy says that a disk is full
            raise UserError(f"cannot make search.index '{path}' ({error})") from None
        if not count:
            raise UserError(f"search.corpus '{corpus}' is empty")
        (aside / STAMP).write_text(json.dumps(stamp | {"passages": count}))
        if path.exists():  # one of the corpus as it was before
            shutil.rmtree(path)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fits(path, stamp):
    made_from = _stamp(path) or {}
    return all(made_from.get(key) == value for key, value in stamp.items())


def _stamp(path):
    """What the index in a folder was made from; None if there is none."""
    try:
        made_from = json.loads((path / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return made_from if isinstance(made_from, dict) else None


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
        rows = [hit.get("document", hit) for hit in answer["result"][0]]
        return [_contents(row, "a passage of the server") for row in rows]
    except (KeyError, IndexError, TypeError, AttributeError, UserError):
        raise not_understood("the search server", json.dumps(answer)) from None


def _web_request(web, secret, query, k):
    """-> method, arguments of the request to that API."""
    if web == "serper":
        return "POST", {"json": {"q": query, "num": k}, "headers": {"X-API-KEY": secret}}
    if web == "brave":
        headers = {"X-Subscription-Token": secret, "Accept": "application/json"}
        return "GET", {"params": {"q": query, "count": k}, "headers": headers}
    headers = {"Authorization": f"Bearer {secret}"}
    return "POST", {"json": {"query": query, "max_results": k}, "headers": headers}


def _web_passages(web, answer):
    """The results in that API's answer, each "title\\nsnippet (address)"."""
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
