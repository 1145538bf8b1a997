"""BM25 by tantivy (k1 1.2, b 0.75): the index of a corpus, in a folder or in memory.

Words are lower-cased, without accents, stemmed as English. The folder holds the passages too, and
is mapped, not loaded: a million passages take no memory of note. Equal scores come in the order of
the corpus, so a query has the same result in every run.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from run.config import UserError
from tools.retrieval import corpus as corpora
from tools.retrieval.corpus import Passage

VERSION = 2  # of the index's form: an older one is made anew
HEAP = 256 * 2**20  # bytes that the indexer fills before it writes a part of the index
MANY = 10_000  # passages; in so many, words of no interest slow a search
TIES = 50_000  # equal scores that are put in order; more take too long, and say nothing
TERMS = 64  # different words of a query that count; what a model repeats for ever is cut


class Index:
    """BM25 over a corpus; made if it is not there. Any number of threads may search."""

    def __init__(self, corpus: str, folder: str = ""):
        """corpus: a JSONL file, or task:name. folder: of the index; "" for <corpus>.bm25."""
        tantivy = _tantivy()
        if corpus.startswith(corpora.TASK):
            if folder:
                raise UserError(f"search.index has no effect on {corpus}, kept in memory")
            passages = corpora.of_task(corpus)
            self.made_from = hashlib.blake2b(repr(passages).encode(), digest_size=12).hexdigest()
            index = _open(tantivy)
            _fill(tantivy, index, passages)
        else:

            def fill(aside):
                return _fill_folder(tantivy, aside, Path(corpus), folder)

            path = corpora.made_folder(Path(corpus), folder, "bm25", {"version": VERSION}, fill)
            self.made_from = str(corpora.made_from(path))  # kept results are of this very corpus
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

    def find(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Finds the k best passages for each query, the best first."""
        return [self.find_one(query, k) for query in queries]

    def find_one(self, query: str, k: int) -> list[Passage]:
        """Finds the k best passages, the best first."""
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
        found = []
        for i in order[:k]:
            document = self.searcher.doc(places[i])
            contents = document.get_first("contents")
            found.append(Passage(document.get_first("id"), contents, scores[i]))
        return found

    def _telling(self, words):
        """Drops the words that most passages have ("the", "of"), unless there are no others:
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
    builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
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
    """Opens an index in a folder, new if that is empty, or in memory."""
    index = tantivy.Index(_schema(tantivy), path=path and str(path))
    index.register_tokenizer("words", _analyzer(tantivy))
    return index


def _fill_folder(tantivy, aside, corpus, folder):
    """Indexes a file into the folder `aside`; returns how many passages there are."""
    try:
        return _fill(tantivy, _open(tantivy, aside), corpora.read(corpus))
    except ValueError as error:  # how tantivy says that a disk is full
        where = folder or aside.parent
        raise UserError(f"cannot make search.index '{where}' ({error})") from None


def _fill(tantivy, index, passages):
    """Adds all passages; returns how many. One thread: the same parts in every run."""
    writer = index.writer(HEAP, 1)
    count = 0
    try:
        for count, passage in enumerate(passages, 1):
            document = tantivy.Document(contents=passage.contents, id=passage.id, number=count)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
    except BaseException:  # Ctrl-C too: its threads still write, and the folder is to be removed
        with suppress(ValueError):
            writer.rollback()
            writer.wait_merging_threads()
        raise
    return count
