"""Dense retrieval: passages by the nearness of meaning, and a second look at the best of them.

    index = Index("wiki.jsonl", "minishlab/potion-retrieval-32M")  # a folder does as well
    index = Hybrid(bm25.Index("wiki.jsonl"), index)
    index = Reranked(index, "cross-encoder/ms-marco-MiniLM-L6-v2")
    (passages,) = index.find(["who wrote hamlet"], k=3)

A model is whatever sentence-transformers loads, by folder or name: static embeddings (a table of
word vectors: thousands of texts a second without a GPU) or a transformer. The folder of the index
holds a vector for each passage and the passages; both are mapped, not loaded. Search is exact: a
query is compared with each passage, on the model's device.

What is covered: an index is made anew when the corpus has changed, or the model says something
else. What is not: approximate search. A query reads all vectors, 100 MB for 100,000 passages of 256
numbers; tens of millions need a GPU with room for them, or a server with an index such as faiss.
"""

import hashlib
import json
import threading
from itertools import islice
from pathlib import Path

from run.config import UserError
from tools.retrieval import corpus as corpora
from tools.retrieval.corpus import Passage

VERSION = 1  # of the index's form: an older one is made anew
AT_ONCE = 2048  # passages that are in memory together
BATCH = 256  # of them that go through the model together
PROBES = 16  # first passages, by whose vectors one model is told from another
POOL = 20  # passages that are put in another order, at least; more if more are wanted
EXTRA = 'pip install -e ".[dense]"'


class Index:
    """Dense retrieval over a corpus; made if it is not there. Any number of threads may search."""

    def __init__(
        self,
        corpus: str,
        model: str,
        folder: str = "",
        query_prefix: str = "",
        passage_prefix: str = "",
    ):
        """corpus: a JSONL file. model: a folder or a name. folder: of the index; "" for beside the
        corpus. query_prefix, passage_prefix: in front of the texts, for models that want one
        ("query: " and "passage: " of E5); where a model's folder names its own, these stay away."""
        import numpy as np

        if corpus.startswith(corpora.TASK):
            raise UserError(f"search.dense needs a file as search.corpus, not {corpus}")
        self.query_prefix = query_prefix
        self.passage_prefix = passage_prefix
        self.model = load_model(model)
        self.lock = threading.Lock()  # the tokenizer of one model may not run in two threads
        probes = [passage.contents for passage in islice(corpora.read(Path(corpus)), PROBES)]
        facts = {"version": VERSION, "passage_prefix": passage_prefix, "model": []}
        if probes:
            mean = self._encode_passages(probes).mean(axis=0)
            facts["model"] = [round(float(value), 3) for value in mean[:64]]
        name = hashlib.blake2b(model.encode(), digest_size=4).hexdigest()

        def fill(aside):
            return self._fill(aside, Path(corpus))

        path = corpora.made_folder(Path(corpus), folder, f"{name}.dense", facts, fill)
        self.made_from = str(corpora.made_from(path)) + query_prefix
        try:
            vectors = np.load(path / "vectors.npy", mmap_mode="r")
            self.starts = np.load(path / "starts.npy", mmap_mode="r")
            self.passages = np.memmap(path / "passages.jsonl", mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"the index '{path}' is broken ({error}): remove it") from None
        self.vectors = _on_device(vectors, self.model.device)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def find(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Finds the k best passages for each query by the cosine of the vectors, the best first."""
        import torch

        encoded = torch.from_numpy(self._encode_queries(queries)).to(self.vectors)  # (Q, D)
        cosines = (encoded @ self.vectors.T).float()  # (Q, N)
        values, numbers = cosines.topk(min(k, len(self)), dim=1)
        found = []
        for row_values, row_numbers in zip(values.tolist(), numbers.tolist(), strict=True):
            best = []
            for cosine, number in zip(row_values, row_numbers, strict=True):
                best.append(self._passage(number, round(cosine, 5)))
            found.append(best)
        return found

    def _passage(self, number, score):
        line = bytes(self.passages[self.starts[number] : self.starts[number + 1]])
        id, contents = json.loads(line)
        return Passage(id, contents, score)

    def _encode_queries(self, texts):
        """Encodes queries as vectors of length 1, (texts, D)."""
        texts = [self.query_prefix + text for text in texts]
        with self.lock:
            return self.model.encode_query(
                texts, normalize_embeddings=True, show_progress_bar=False
            )

    def _encode_passages(self, texts):
        texts = [self.passage_prefix + text for text in texts]
        with self.lock:
            return self.model.encode_document(
                texts, normalize_embeddings=True, show_progress_bar=False, batch_size=BATCH
            )

    def _fill(self, aside, corpus):
        """Writes the index into the folder `aside`; returns how many passages there are."""
        import numpy as np

        # 1. the passages as lines, and where each begins
        starts = [0]
        with open(aside / "passages.jsonl", "wb") as file:
            for passage in corpora.read(corpus):
                line = json.dumps([passage.id, passage.contents]).encode() + b"\n"
                starts.append(starts[-1] + file.write(line))
        np.save(aside / "starts.npy", np.array(starts))
        count = len(starts) - 1
        if count == 0:
            return 0

        # 2. their vectors, some at a time: all texts need not be in memory
        vectors = None
        with open(aside / "passages.jsonl", "rb") as file:
            for start in range(0, count, AT_ONCE):
                end = min(count, start + AT_ONCE)
                texts = [json.loads(file.readline())[1] for _ in range(start, end)]
                encoded = self._encode_passages(texts)  # (texts, D)
                if vectors is None:
                    shape = (count, encoded.shape[1])
                    path = aside / "vectors.npy"
                    vectors = np.lib.format.open_memmap(path, "w+", np.float32, shape)
                vectors[start:end] = encoded
        vectors.flush()
        return count


class Hybrid:
    """Two indexes of one corpus, in the order of both: each adds 1 / (60 + place) to the score of
    what it finds (reciprocal rank fusion, Cormack et al. 2009)."""

    def __init__(self, first, second):
        self.indexes = (first, second)
        self.made_from = f"{first.made_from} and {second.made_from}"

    def __len__(self) -> int:
        return len(self.indexes[0])

    def find(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Finds the k best passages for each query, the best first."""
        found = [index.find(queries, max(k, POOL)) for index in self.indexes]
        return [_fused(lists, k) for lists in zip(*found, strict=True)]


def _fused(lists, k):
    """Finds the k best of the passages that several lists have."""
    best = {}
    for passages in lists:
        for place, passage in enumerate(passages, 1):
            key = (passage.id, passage.contents)
            best.setdefault(key, Passage(*key)).score += 1 / (60 + place)
    ordered = sorted(best.values(), key=lambda passage: -passage.score)  # stable
    return ordered[:k]


class Reranked:
    """An index of either kind, the best passages of which a cross-encoder puts in order."""

    def __init__(self, index, model: str):
        """model: a folder or a name."""
        self.index = index
        self.model = load_model(model, "CrossEncoder")
        self.made_from = f"{index.made_from} {model}"
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    def find(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Finds the k best passages for each query, the best first; scored by the cross-encoder."""
        found = self.index.find(queries, max(k, POOL))
        pairs = []
        for query, passages in zip(queries, found, strict=True):
            pairs += [(query, passage.contents) for passage in passages]
        if not pairs:
            return found
        with self.lock:
            scores = iter(self.model.predict(pairs, show_progress_bar=False).tolist())
        for passages in found:
            for passage in passages:
                passage.score = round(next(scores), 5)
            passages.sort(key=lambda passage: -passage.score)  # stable: equal ones as they came
        return [passages[:k] for passages in found]


def load_model(name: str, kind: str = "SentenceTransformer"):
    """Loads a model of sentence-transformers, by folder or name. UserError if that fails."""
    option = "dense" if kind == "SentenceTransformer" else "rerank"
    try:
        import sentence_transformers
    except ImportError:
        raise UserError(f"search.{option} needs sentence-transformers: {EXTRA}") from None
    try:
        return getattr(sentence_transformers, kind)(name)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:300]
        what = "a folder or the name of a model that sentence-transformers loads"
        raise UserError(f"search.{option} = {name!r}: expected {what} ({why})") from None


def _on_device(vectors, device):
    """Puts the vectors on a device: a CPU leaves them mapped, a GPU gets them in half the size."""
    import torch

    if device.type == "cpu":
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mapping is read-only: nothing writes it
            return torch.from_numpy(vectors)
    return torch.tensor(vectors, dtype=torch.float16, device=device)
