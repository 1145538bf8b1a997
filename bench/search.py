"""The search tool on this machine: how long a corpus takes to index, queries per second, memory.

    python bench/search.py                                   # half a minute
    python bench/search.py --passages=1000000                # a Wikipedia in small: five minutes
    python bench/search.py --save_to=evidence/bench/search.json

The passages are generated: 100 words each, drawn from 100,000 by Zipf's law, so that some words
are in all of them, as in a real text. A query is eight words of one passage; none is asked twice,
so the cache of results helps nobody. Indexing and searching are processes of their own, so that
each has its own memory. "private" is what a process takes for itself: the index is mapped, and
its pages are the system's to drop. Exit code 1 if indexing takes longer, or queries per second
through a Toolbox are fewer, than the limits below say for 100,000 passages.
"""

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

MOST_INDEX_SECONDS = 60.0
LEAST_QUERIES_PER_SECOND = 200.0


@dataclass
class Config:
    passages: int = 100_000
    queries: int = 2000
    k: int = 3  # passages in a result
    concurrency: int = 16  # calls at once, through the Toolbox
    seed: int = 0
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: index or search
    corpus: str = ""  # for the subprocesses


def generate(path: Path, passages: int, seed: int) -> None:
    """Writes a corpus in Search-R1's form."""
    import numpy as np

    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(letters[rng.integers(26, size=rng.integers(3, 11))]) for _ in range(100_000)]
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    with open(path, "w") as file:
        for number in range(passages):
            ids = np.searchsorted(share, rng.random(100) * share[-1])
            text = " ".join([words[i] for i in ids])
            row = {"id": str(number), "contents": f'"{words[ids[-1]]} {number}"\n{text}'}
            file.write(json.dumps(row) + "\n")


def queries(path: Path, count: int) -> list[str]:
    """Takes eight words of each of the first passages."""
    with open(path) as file:
        lines = [file.readline() for _ in range(count)]
    texts = [json.loads(line)["contents"].split("\n")[1].split() for line in lines if line]
    return [" ".join(words[i % 90 : i % 90 + 8]) for i, words in enumerate(texts)]


def index(cfg: Config) -> dict:
    from tools.retrieval.bm25 import Index

    start = time.perf_counter()
    opened = Index(cfg.corpus)
    seconds = time.perf_counter() - start
    folder = Path(cfg.corpus + ".bm25")
    size = sum(file.stat().st_size for file in folder.iterdir())
    result = {"indexed": len(opened), "index_seconds": seconds, "index_mb": size / 2**20}
    return result | memory()


def search(cfg: Config) -> dict:
    from tools import Toolbox
    from tools.retrieval.bm25 import Index

    # 1. one thread asks the index
    start = time.perf_counter()
    opened = Index(cfg.corpus)
    open_seconds = time.perf_counter() - start
    texts = queries(Path(cfg.corpus), cfg.queries)
    seconds = []  # of each query
    for query in texts:
        start = time.perf_counter()
        assert opened.find_one(query, cfg.k), f"nothing found for {query}"
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    result = {
        "open_seconds": open_seconds,
        "one_thread_per_second": len(seconds) / sum(seconds),
        "p50_ms": 1000 * seconds[len(seconds) // 2],
        "p99_ms": 1000 * seconds[len(seconds) * 99 // 100],
    }
    # now: the Toolbox would add transformers, which a run has anyway
    result |= memory()

    # 2. the same through a Toolbox
    options = (f"search.corpus={cfg.corpus}", f"search.k={cfg.k}")
    box = Toolbox(["search"], cfg.concurrency, options=options)
    start = time.perf_counter()
    asyncio.run(call_all(box, texts))
    result["queries_per_second"] = len(texts) / (time.perf_counter() - start)
    assert not box.errors, f"errors: {box.errors}"
    return result


async def call_all(box, texts: list[str]) -> None:
    """Sends all queries through the Toolbox, as a rollout calls it."""
    session = box.open({})
    await asyncio.gather(*(session.call("search", {"query": query}) for query in texts))
    await session.close()
    await box.close()


def memory() -> dict:
    """Returns, of this process, its peak in MB, mapped pages included, and what is its own now
    (Linux)."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    private = [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
    return {"peak_mb": peak, "private_mb": private[0] if private else None}


def part(cfg: Config, name: str, corpus: Path) -> dict:
    """Measures a part in a process of its own."""
    argv = [sys.executable, __file__, f"--part={name}", f"--corpus={corpus}"]
    for key in ("passages", "queries", "k", "concurrency", "seed"):
        argv.append(f"--{key}={getattr(cfg, key)}")
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(cfg: Config) -> dict:
    """Measures all; returns the numbers under the names that `show` prints."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        generate(corpus, cfg.passages, cfg.seed)
        return {
            "passages": cfg.passages,
            "corpus_mb": corpus.stat().st_size / 2**20,
            "index": part(cfg, "index", corpus),
            "search": part(cfg, "search", corpus),
        }


def show(measured: dict) -> None:
    indexing = measured["index"]
    searching = measured["search"]
    print(f"passages: {measured['passages']} ({measured['corpus_mb']:.0f} MB)")
    print(f"index_seconds: {indexing['index_seconds']:.1f} ({indexing['index_mb']:.0f} MB on disk)")
    print(f"index_peak_mb: {indexing['peak_mb']:.0f}")
    print(f"queries_per_second: {searching['queries_per_second']:.0f} (through a Toolbox)")
    print(f"one_thread_per_second: {searching['one_thread_per_second']:.0f}")
    print(f"query_ms: p50 {searching['p50_ms']:.2f}, p99 {searching['p99_ms']:.2f}")
    private = searching["private_mb"] or 0
    print(f"search_peak_mb: {searching['peak_mb']:.0f}, private {private:.0f}")


def misses(measured: dict) -> list[str]:
    """Lists what is slower than it has to be, with 100,000 passages."""
    seconds = measured["index"]["index_seconds"]
    queries_per_second = measured["search"]["queries_per_second"]
    misses = []
    if seconds > MOST_INDEX_SECONDS:
        misses.append(
            f"search: indexed in {seconds:.0f} s, expected at most {MOST_INDEX_SECONDS:g}"
        )
    if queries_per_second < LEAST_QUERIES_PER_SECOND:
        misses.append(
            f"search: {queries_per_second:.0f} queries/s, "
            f"expected at least {LEAST_QUERIES_PER_SECOND:g}"
        )
    return misses


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    if cfg.part:
        result = index(cfg) if cfg.part == "index" else search(cfg)
        print(json.dumps(result))
        return
    measured = measure(cfg)
    show(measured)
    if cfg.save_to:
        Path(cfg.save_to).write_text(json.dumps(measured, indent=1) + "\n")
    missed = misses(measured)
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    config.main(main)
