"""recall@5 of BM25, of a dense model and of both: what can honestly be asked without a Wikipedia.

    pip install wordllama; python bench/recall.py --save_to=evidence/bench/recall.json
    python bench/recall.py --model=a_folder_or_name

Without a model it is the one that the package wordllama carries: 32,000 tokens of 256 numbers.

Natural Questions come here as questions with answers, without the passages that have them. So:

  halves     100,000 passages: each of the 3,610 rows as "question, answers", the others made of the
             halves of two other questions and the answers of a third. Asked is a question without
             every second word. It measures whether the words that are left find their row among
             passages of the same words: no paraphrase, so BM25's own ground.
  answers    3,610 passages, each the answers of a row alone. Asked is the question: what is found
             is found by association, as hardly a word is in both.
  functions  the functions of BFCL, each by its name and descriptions. Asked is what a user asked
             for in his own words: the only one of the three that people wrote for each other.

Found is the row's own passage, or one with the same text, among the first five. What is not
measured: passages of a real encyclopedia.
"""

import importlib.util
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import config
from run.config import UserError

if __name__ == "__main__":
    config.answer_help(__file__)

from tools.search import open_index

K = 5
AT_ONCE = 64  # queries


@dataclass
class Config:
    model: str = ""  # of dense retrieval, by folder or name; "" = that of the package wordllama
    data: str = "../shared/data"  # nq_open_dev.jsonl, bfcl/
    passages: int = 100_000  # of halves
    seed: int = 0
    save_to: str = ""  # a .json for the results


def wordllama(folder: Path) -> str:
    """Writes the static model that lies in the installed package, as sentence-transformers reads
    it. UserError if it is not installed."""
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("wordllama")
    if spec is None:
        raise UserError("no model: pip install wordllama, or write --model=a_folder_or_name")
    package = Path(spec.submodule_search_locations[0])
    weights = load_file(package / "weights/l2_supercat_256.safetensors")["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(package / "tokenizers/l2_supercat_tokenizer_config.json"))
    table = StaticEmbedding(tokenizer, embedding_weights=weights.astype("float32"))
    SentenceTransformer(modules=[table], device="cpu").save(str(folder))
    return str(folder)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def halves(cfg: Config) -> tuple[list[str], list[tuple[str, str]]]:
    """Makes passages, and (query, the passage that it asks for)."""
    rng = random.Random(cfg.seed)
    rows = rows_of(Path(cfg.data) / "nq_open_dev.jsonl")
    passages = [f"{row['question']}\n{', '.join(row['answer'])}" for row in rows]
    asked = []
    for row, passage in zip(rows, passages, strict=True):
        asked.append((" ".join(row["question"].split()[::2]), passage))
    while len(passages) < cfg.passages:
        first, second, third = rng.sample(rows, 3)
        words = first["question"].split()
        others = second["question"].split()
        mixed = words[: len(words) // 2] + others[len(others) // 2 :]
        passages.append(f"{' '.join(mixed)}\n{', '.join(third['answer'])}")
    return passages, asked


def answers(cfg: Config) -> tuple[list[str], list[tuple[str, str]]]:
    rows = rows_of(Path(cfg.data) / "nq_open_dev.jsonl")
    passages = [", ".join(row["answer"]) for row in rows]
    asked = [(row["question"], text) for row, text in zip(rows, passages, strict=True)]
    return passages, asked


def functions(cfg: Config) -> tuple[list[str], list[tuple[str, str]]]:
    texts = {}  # of each function, by its name
    asked = []
    for name in ("simple_python", "multiple"):
        gold_rows = rows_of(Path(cfg.data) / "bfcl/possible_answer" / f"{name}.jsonl")
        golds = {row["id"]: next(iter(row["ground_truth"][0])) for row in gold_rows}
        for row in rows_of(Path(cfg.data) / "bfcl" / f"{name}.jsonl"):
            for function in row["function"]:
                properties = function["parameters"]["properties"]
                described = [value.get("description", "") for value in properties.values()]
                words = function["name"].replace("_", " ").replace(".", " ")
                texts.setdefault(
                    function["name"], " ".join([words, function["description"], *described])
                )
            asked.append((row["question"][0][0]["content"], golds[row["id"]]))
    return list(texts.values()), [(query, texts[gold]) for query, gold in asked]


def recall(index, asked) -> dict:
    """Measures how often the passage is among the first five, and a query's ms among many."""
    found = 0
    start = time.perf_counter()
    for begin in range(0, len(asked), AT_ONCE):
        part = asked[begin : begin + AT_ONCE]
        results = index.find([query for query, _ in part], K)
        for (_, wanted), passages in zip(part, results, strict=True):
            found += any(passage.contents == wanted for passage in passages)
    seconds = time.perf_counter() - start
    return {"recall": found / len(asked), "ms": 1000 * seconds / len(asked)}


def measure(cfg: Config) -> dict:
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        model = cfg.model or wordllama(Path(folder, "model"))
        for task in (halves, answers, functions):
            passages, asked = task(cfg)
            corpus = Path(folder, f"{task.__name__}.jsonl")
            with open(corpus, "w", encoding="utf-8") as file:
                for passage in passages:
                    file.write(json.dumps({"contents": passage}) + "\n")
            result = {"passages": len(passages), "queries": len(asked)}
            kinds = {
                "bm25": {},
                "dense": {"dense": model},
                "hybrid": {"dense": model, "hybrid": True},
            }
            for kind, options in kinds.items():
                start = time.perf_counter()
                index = open_index(str(corpus), **options)
                seconds = time.perf_counter() - start
                result[kind] = recall(index, asked) | {"index_seconds": seconds}
            measured[task.__name__] = result
            line = ", ".join(
                f"{kind} {result[kind]['recall']:.3f} ({result[kind]['ms']:.1f} ms a query, "
                f"ready in {result[kind]['index_seconds']:.1f} s)"
                for kind in kinds
            )
            print(f"{task.__name__}: {len(passages)} passages, {len(asked)} queries: {line}")
    return measured


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    measured = measure(cfg)
    if cfg.save_to:
        Path(cfg.save_to).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    config.main(main)
