"""tools/retrieval/dense.py: vectors of passages by a model, its index on disk, and the reranker.

    pytest tests/test_dense.py

The models are made here: a table of word vectors in which synonyms lie side by side, and a
transformer of two layers. What a real model finds: bench/recall.py.
"""

import asyncio
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from run.config import UserError
from tools import Toolbox
from tools.retrieval import dense
from tools.search import open_index, search

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason='pip install -e ".[dense]"'
)
PASSAGES = [
    {"id": "a", "contents": "Cars\nThe car is fast."},
    {"id": "b", "contents": "Houses\nThe house is big."},
    {"id": "c", "contents": "Cats\nThe cat sleeps."},
]
MEANINGS = [["car", "cars", "automobile"], ["house", "houses", "villa"], ["cat", "cats", "kitten"]]
OTHERS = "[UNK] the is fast big sleeps query passage a :".split()


def static_model(folder, turned=0.0):
    """Words of one meaning have one vector, all others are near zero. turned: of another model."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = [*OTHERS, *(word for meaning in MEANINGS for word in meaning)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.full((len(words), 8), 0.001, dtype=np.float32)
    for number, meaning in enumerate(MEANINGS):
        for word in meaning:
            vectors[words.index(word), number] = 1.0
            vectors[words.index(word), 7] = turned
    vectors[words.index("query"), 6] = 1.0  # a prefix that can be seen
    table = StaticEmbedding(tokenizer, embedding_weights=vectors)
    sentence_transformers.SentenceTransformer(modules=[table], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return static_model(tmp_path_factory.mktemp("static"))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    return str(path)


def ids(index, query, k=3):
    (found,) = index.find([query], k)
    return [passage.id for passage in found]


def test_a_word_of_the_same_meaning_finds_what_bm25_does_not(corpus, model):
    index = dense.Index(corpus, model)
    assert len(index) == 3
    (cars, villas) = index.find(["automobile", "the villa"], 1)
    assert cars[0].id == "a" and cars[0].contents == PASSAGES[0]["contents"]
    assert villas[0].id == "b" and villas[0].score > 0.9
    assert len(index.find(["kitten"], 100)[0]) == 3  # there are no more
    pytest.importorskip("tantivy")
    assert ids(open_index(corpus), "automobile") == []


def test_the_search_tool_and_its_options(corpus, model):
    options = [f"search.corpus={corpus}", f"search.dense={model}", "search.k=1"]
    box = Toolbox([search], options=options)
    content, error, _ = asyncio.run(box.open().call("search", {"query": "a kitten"}))
    assert error is None and content == "Doc 1(Title: Cats) The cat sleeps."
    with pytest.raises(UserError, match="search.dense = 'x' has no effect without search.corpus"):
        search(url="http://127.0.0.1/x", dense="x")
    for idle in ({"query_prefix": "query: "}, {"hybrid": True}):
        with pytest.raises(UserError, match="passage_prefix have no effect without dense"):
            search(corpus=corpus, **idle)
    with pytest.raises(UserError, match="hybrid makes two indexes"):
        search(corpus=corpus, dense=model, hybrid=True, index="x")
    with pytest.raises(UserError, match="search.dense needs a file as search.corpus"):
        search(corpus="task:facts", dense=model)


def test_the_index_is_kept_until_corpus_or_model_change(corpus, model, tmp_path, monkeypatch):
    fills = []
    fill = dense.Index._fill
    monkeypatch.setattr(
        dense.Index, "_fill", lambda self, *given: fills.append(1) or fill(self, *given)
    )
    first = dense.Index(corpus, model)
    again = dense.Index(corpus, model)
    assert len(fills) == 1 and first.made_from == again.made_from

    # 1. another corpus
    row = {"id": "d", "contents": "More\nkitten kitten"}
    with open(corpus, "a") as file:
        file.write(json.dumps(row) + "\n")
    assert sorted(ids(dense.Index(corpus, model), "kitten", 2)) == ["c", "d"]
    assert len(dense.Index(corpus, model)) == 4 and len(fills) == 2
    assert ids(again, "kitten", 1) == ["c"]  # goes on with what it has opened

    # 2. another model in the same folder, as after some training; and another prefix
    folder = static_model(tmp_path / "model")
    before = dense.Index(corpus, folder)
    static_model(folder, turned=1.0)
    after = dense.Index(corpus, folder)
    assert len(fills) == 4 and before.made_from != after.made_from
    prefixed = dense.Index(corpus, folder, passage_prefix="passage: ")
    assert len(fills) == 5 and prefixed.made_from != after.made_from

    # 3. one folder a model
    names = [name for name in os.listdir(tmp_path) if name.endswith(".dense")]
    assert len(names) == 2


def test_a_prefix_goes_in_front_of_what_the_model_reads(corpus, model):
    plain = dense.Index(corpus, model).find(["cat"], 1)[0][0].score
    index = dense.Index(corpus, model, query_prefix="query: ")
    assert index.find(["cat"], 1)[0][0].score < plain - 0.1  # our "query" points elsewhere
    assert index.made_from != dense.Index(corpus, model).made_from  # kept results are its own


def test_many_threads_search_at_once(corpus, model):
    index = dense.Index(corpus, model)
    outcomes = []

    def ask():
        for _ in range(10):
            outcomes.append([ids(index, word, 1) for word in ("car", "villa", "kitten")])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 80
    assert all(found == [["a"], ["b"], ["c"]] for found in outcomes)


def test_ten_thousand_passages_are_as_numpy_ranks_them(tmp_path, model):
    """In several batches, and each at its place."""
    rng = np.random.default_rng(0)
    words = [word for meaning in MEANINGS for word in meaning] + ["fast", "big", "sleeps"]
    rows = [{"contents": " ".join(rng.choice(words, 6))} for _ in range(10_000)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = dense.Index(str(path), model)
    vectors = index.model.encode([row["contents"] for row in rows], normalize_embeddings=True)
    query = index.model.encode(["fast kitten villa villa"], normalize_embeddings=True)[0]
    expected = np.sort(vectors @ query)[::-1][:50]
    found = index.find(["fast kitten villa villa"], 50)[0]
    assert np.allclose([passage.score for passage in found], expected, atol=1e-4)
    for passage in found:
        number = int(passage.id)
        assert passage.contents == rows[number]["contents"]
        assert passage.score == pytest.approx(float(vectors[number] @ query), abs=1e-4)


def test_hybrid_is_the_order_of_both(corpus, model):
    """What one index alone finds is found; what both find comes first."""
    pytest.importorskip("tantivy")
    index = open_index(corpus, dense=model, hybrid=True)
    by_words, by_meaning = index.indexes
    for query in ("automobile sleeps", "the big villa", "fast kitten"):
        scores = {}
        for each in (by_words, by_meaning):
            for place, id in enumerate(ids(each, query), 1):
                scores[id] = scores.get(id, 0) + 1 / (60 + place)
        (found,) = index.find([query], 3)
        assert {hit.id: hit.score for hit in found} == pytest.approx(scores)
        assert [hit.score for hit in found] == sorted(scores.values(), reverse=True)
    assert len(index) == 3 and index.made_from not in (by_words.made_from, by_meaning.made_from)
    assert ids(index, "automobile", 1) == ["a"]  # BM25 finds nothing


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """Two layers, untrained: whatever it says, it says it again."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("cross"))
    words = ["[PAD]", "[CLS]", "[SEP]", *OTHERS, *(word for words in MEANINGS for word in words)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    shape = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=1.0,
    )
    BertForSequenceClassification(shape).save_pretrained(folder)
    return folder


def test_a_cross_encoder_puts_the_best_of_either_index_in_its_order(corpus, model, cross_encoder):
    judge = sentence_transformers.CrossEncoder(cross_encoder, device="cpu")
    query = "the car is fast"
    scores = judge.predict([(query, row["contents"]) for row in PASSAGES])
    order = [PASSAGES[i]["id"] for i in np.argsort(-scores)]
    index = open_index(corpus, dense=model, rerank=cross_encoder)
    assert len(index) == 3 and ids(index, query) == order and ids(index, query, 1) == order[:1]
    (found,) = index.find([query], 3)
    assert [hit.score for hit in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-3)
    assert index.find(["cat", "car"], 2)[1] == index.find(["car"], 2)[0]  # each query on its own
    assert index.made_from != open_index(corpus, dense=model).made_from
    pytest.importorskip("tantivy")
    by_words = open_index(corpus, rerank=cross_encoder)
    assert set(ids(by_words, "fast cat")) == {"a", "c"} and ids(by_words, "xylophone") == []


def test_the_retrieve_server_serves_it_to_many_at_once(corpus, model):
    """What waits is encoded and searched together; each gets its own."""
    from serve import retrieve

    index = dense.Index(corpus, model)
    words = ["automobile", "villa", "kitten"]

    async def scene():
        retriever = retrieve.Retriever(index, retrieve.Config(corpus=corpus))
        working = asyncio.create_task(retriever.work())
        bodies = []
        for number in range(90):
            request = {"queries": [words[number % 3]], "topk": 1, "return_scores": True}
            bodies.append(json.dumps(request).encode())
        answers = await asyncio.gather(*(retriever.retrieve(body) for body in bodies))
        working.cancel()
        await asyncio.wait({working})
        return answers

    for number, answer in enumerate(asyncio.run(scene())):
        ((hit,),) = answer["result"]
        assert hit["document"]["id"] == "abc"[number % 3] and hit["score"] > 0.9


@pytest.mark.parametrize("option", ["dense", "rerank"])
def test_what_is_no_model_and_a_missing_package_are_said(corpus, option, tmp_path, monkeypatch):
    pytest.importorskip("tantivy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"search.{option} = .*empty.*: expected a folder or"):
        open_index(corpus, **{option: str(tmp_path / "empty")})
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=rf"search.{option} needs .*pip install -e \"\.\[dense\]"):
        open_index(corpus, **{option: "x"})


def test_an_empty_corpus_and_a_broken_index_are_said(corpus, model, tmp_path):
    folder = tmp_path / "index"
    dense.Index(corpus, model, str(folder))
    (folder / "vectors.npy").write_bytes(b"broken")
    with pytest.raises(UserError, match="is broken .*: remove it"):
        dense.Index(corpus, model, str(folder))
    Path(corpus).write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        dense.Index(corpus, model)
